/* The page: what is asked, of whom, and where the answers are shown. */

import { Column } from "./column.js";
import { Detail } from "./detail.js";
import { at, make } from "./dom.js";
import { BASE, Legend, Looks } from "./experts.js";
import { Pictures } from "./pictures.js";
import { Refusal, Server } from "./server.js";
import * as settings from "./settings.js";
import { followTheme } from "./theme.js";

const SEEDS = 2 ** 31;
const EXPERT = /^expert:/; // before an expert's name, where a model is asked for
const server = new Server(document.baseURI);
const pictures = new Pictures({
  drop: at("drop"),
  list: at("pictures"),
  pick: at("pick"),
  form: at("ask"),
  onProblem: (text) => notice(at("notice"), new Refusal(text, { status: 400 })),
});
let looks = null;
let columns = [];
let running = null; // what stops the answers that come
let opened = false;
let wanted = null; // what was asked for before it was known whom to ask

/* Say what went wrong, and what to do. */
function notice(place, refusal, again = null) {
  const told = make("div", { class: "notice", role: "alert" }, make("p", {}, refusal.message));
  if (refusal.advice) told.append(make("p", {}, refusal.advice));
  if (again && refusal.passes) {
    const button = make("button", { type: "button", class: "quiet" }, "Try again");
    button.addEventListener("click", again);
    told.append(button);
  }
  place.replaceChildren(told);
  return told;
}

/* Ask the server who there is, and fit the form to it. */
async function open() {
  at("notice").replaceChildren();
  let models;
  try {
    models = await server.models();
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    wantsKey(error);
    notice(at("notice"), error, open);
    // a server that is being started needs nobody to press a button
    if (error.code === "loading") setTimeout(open, 1000 * (error.seconds ?? 1));
    return;
  }
  const [stack] = models;
  const named = stack.experts ?? [];
  // the base speaks where it can be asked, or where the router may leave a text to it
  const speaks = named.includes(BASE) || models.some(({ id }) => id === BASE);
  looks = new Looks(speaks ? [...named.filter((name) => name !== BASE), BASE] : named);
  const pick = (name) => columns.forEach((column) => column.pick(name));
  new Legend(at("legend"), looks, about(models), pick);
  const detail = new Detail(at("detail"), looks, () => columns.forEach((each) => each.leave()));
  onPoint = (token, place, layer) => detail.show(token, place, layer);
  describe(stack, models.length);
  // with another key the form stays as it is
  if (!opened) {
    opened = true;
    fit(stack);
    offer(models);
    settings.fromAddress();
  }
  arrange();
  const first = wanted;
  wanted = null;
  first?.();
}

let onPoint = () => {};

/* Return what is known of experts beside their names, by these. */
function about(models) {
  const known = new Map();
  for (const { id, label, domain, task, description } of models) {
    const facts = [label, domain, task, description].filter((each) => typeof each === "string");
    known.set(id.replace(EXPERT, ""), facts.join(" · ") || null);
  }
  return known;
}

function describe(stack, count) {
  at("name").textContent = stack.id;
  document.title = `${stack.id}: MoleForge playground`;
  const facts = [`${stack.experts?.length ?? 0} experts`];
  if (stack.top_k) facts.push(`${stack.top_k} of them for each token and layer`);
  if (stack.context_tokens) facts.push(`context of ${stack.context_tokens} tokens`);
  facts.push(`${count} models can be asked`);
  at("facts").textContent = facts.join(" · ");
}

/* Fit the form to what the bundle can. */
function fit(stack) {
  // a bundle of tasks has limits of what a question may hold
  const answers = Boolean(stack.limits);
  pictures.enabled = (stack.limits?.images ?? 0) > 0;
  at("picture-field").hidden = !pictures.enabled;
  settings.setMode(answers ? "chat" : "completion");
  at("goes_on").checked = !answers;
  at("max_tokens").value = answers ? "" : 64;
  at("max_tokens").placeholder = answers ? "expert's" : "";
  at("temperature").placeholder = answers ? "0" : "1";
}

/* Offer everybody who can be asked. */
function offer(models) {
  const [stack] = models;
  const option = (model) => make("option", { value: model.id }, titleOf(model, stack.id));
  at("model").replaceChildren(...models.map(option));
  at("beside").replaceChildren(make("option", { value: "" }, "nobody"), ...models.map(option));
}

function titleOf({ id, baseline }, stack) {
  if (id === stack) return `${id} (the stack)`;
  // which of the run's dense models it is
  if (baseline) return `${id} ${baseline}`;
  return EXPERT.test(id) ? `${id.replace(EXPERT, "")} alone` : id;
}

/* Have a column for each who is asked; one that stays keeps what it holds. */
function arrange() {
  const readers = [at("model").value, at("beside").value].filter((each) => each !== "");
  const kept = columns.filter((column) => readers.includes(column.reader));
  columns = [...new Set(readers)].map((reader) => {
    const found = kept.find((column) => column.reader === reader);
    if (found) return found;
    const title = [...at("model").options].find((each) => each.value === reader).text;
    return new Column(looks, reader, title, (...told) => onPoint(...told));
  });
  at("columns").replaceChildren(...columns.map((column) => column.element));
  at("columns").classList.toggle("two", columns.length > 1);
  showMode();
}

function showMode() {
  const chats = settings.mode() === "chat";
  at("prompt-label").textContent = chats ? "Question" : "Text to go on with";
  at("system-field").hidden = !chats;
  at("goes_on").closest("label").hidden = !chats;
}

/* Return what is sent to a column's reader. */
function requestOf(column, seed) {
  const prompt = at("prompt").value;
  const shared = {
    model: column.reader,
    ...settings.sampling(),
    seed,
    stream: true,
    stream_options: { include_usage: true },
    return_experts: true,
  };
  if (settings.mode() === "completion") {
    const body = { ...shared, prompt };
    return { path: "v1/completions", body, asked: prompt, pictures: [], chat: false, seed };
  }
  const messages = [...column.messages, question(prompt)];
  const system = at("system").value;
  if (system && !column.messages.length) messages.unshift({ role: "system", content: system });
  return {
    path: "v1/chat/completions",
    body: { ...shared, messages },
    asked: prompt,
    pictures: pictures.pictures,
    chat: true,
    messages,
    seed,
  };
}

/* Return a message with the pictures that were taken. */
function question(text) {
  if (!pictures.pictures.length) return { role: "user", content: text };
  const parts = pictures.pictures.map(({ url }) => ({ type: "image_url", image_url: { url } }));
  return { role: "user", content: [...parts, { type: "text", text }] };
}

/* Whether the server has not said yet whom it has; what was asked for is done once it has. */
function isEarly(wish) {
  if (columns.length) return false;
  wanted = wish;
  return true;
}

/* Have what was asked in the form again, where nothing else is there. */
function putBack({ asked, pictures: taken }) {
  if (at("prompt").value !== "") return;
  at("prompt").value = asked;
  pictures.put([...taken, ...pictures.pictures]);
}

/* Ask everybody, or with the seed of before those who did not answer, the same, at once and with
   one seed. */
async function generate(readers = columns, before = null) {
  if (running || isEarly(generate)) return;
  const goesOn = settings.mode() === "chat" && at("goes_on").checked;
  if (!goesOn) readers.forEach((column) => column.clear());
  const given = at("seed").value;
  // one that was not given is drawn here, so that it can be told, and is the same for both
  const drawn = before ?? Math.floor(Math.random() * SEEDS);
  const seed = given === "" ? drawn : Number(given);
  await busy("writing", async (signal) => {
    const requests = readers.map((column) => requestOf(column, seed));
    if (goesOn) {
      // it is part of the chat now
      at("prompt").value = "";
      pictures.put([]);
    }
    const asked = readers.map((column, i) => {
      const ask = () => column.ask(server, requests[i], signal);
      const again = () => {
        if (running) return;
        putBack(requests[i]);
        generate([column], seed);
      };
      return answered(column, ask, signal, again);
    });
    const texts = await Promise.all(asked);
    const [text] = texts.filter((each) => each !== null);
    const nothing = text === undefined && !signal.aborted;
    if (goesOn && nothing) putBack(requests[0]);
    if (text !== undefined) say(`The answer is whole: ${text}`);
  });
}

/* Return what the server answers for a column; null where it was refused, which the column tells,
   or stopped. */
async function answered(column, ask, signal, again) {
  try {
    return await ask();
  } catch (error) {
    if (signal.aborted) return null;
    if (!(error instanceof Refusal)) throw error;
    if (error.code === "no_chat_template") {
      settings.setMode("completion");
      showMode();
    }
    wantsKey(error) || settings.markField(error.param);
    column.refuse(notice(make("div"), error, again));
    return null;
  }
}

/* Show who reads what was typed. */
async function route() {
  if (running || isEarly(route)) return;
  const [column] = columns;
  const chats = settings.mode() === "chat";
  const text = at("prompt").value;
  const asked = { asked: text, pictures: chats ? pictures.pictures : [], chat: chats };
  await busy("routing", async (signal) => {
    const body = chats ? { messages: [question(text)] } : { text };
    const found = await answered(column, () => server.route(body, signal), signal, route);
    if (found === null) return;
    column.showRoute(asked, found);
    say("The route is shown.");
  });
}

/* Have work done that can be stopped. */
async function busy(what, work) {
  settings.clearMarks();
  settings.toAddress();
  at("notice").replaceChildren();
  running = new AbortController();
  at("stop").disabled = false;
  at("send").disabled = true;
  at("route").disabled = true;
  say(`The server is ${what}.`);
  try {
    await work(running.signal);
  } finally {
    const { aborted } = running.signal;
    running = null;
    at("stop").disabled = true;
    at("send").disabled = false;
    at("route").disabled = false;
    if (aborted) say("Stopped.");
  }
}

/* Tell who listens to the page. */
function say(text) {
  at("status").textContent = text;
}

/* Show where the key goes, where it is that which is missing. */
function wantsKey(refusal) {
  if (refusal.status !== 401) return false;
  at("key-field").hidden = false;
  at("key").focus();
  return true;
}

function useKey() {
  server.key = at("key").value.trim();
  open();
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  generate();
});
at("stop").addEventListener("click", () => running?.abort());
at("route").addEventListener("click", route);
at("use-key").addEventListener("click", useKey);
at("key").addEventListener("keydown", (event) => {
  if (event.key !== "Enter") return;
  event.preventDefault();
  useKey();
});
at("forget-key").addEventListener("click", () => {
  server.key = "";
  at("key").value = "";
});
at("copy").addEventListener("click", async () => {
  settings.toAddress();
  try {
    await navigator.clipboard.writeText(location.href);
    say("The link is copied.");
    at("copy").textContent = "Copied";
  } catch {
    // not over plain http from another machine; the address bar has it
    at("copy").textContent = "It is in the address bar";
  }
  setTimeout(() => (at("copy").textContent = "Copy link"), 2000);
});
for (const id of ["model", "beside"]) at(id).addEventListener("change", arrange);
at("mode-field").addEventListener("change", () => {
  columns.forEach((column) => column.clear());
  showMode();
});
at("ask").addEventListener("change", settings.toAddress);
window.addEventListener("hashchange", () => {
  settings.fromAddress();
  if (looks) arrange();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running) {
    running.abort();
    event.preventDefault();
  } else if (event.key === "Escape") {
    columns.forEach((column) => column.leave());
  }
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    at("ask").requestSubmit();
  }
});
followTheme(at("theme"), () => {
  looks?.changed();
  columns.forEach((column) => column.repaint());
});
at("key").value = server.key;
at("key-field").hidden = !server.key;
await open();
