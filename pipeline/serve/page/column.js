/* One reader's answers: what was asked, the text as it comes, who spoke it, pictures with boxes. */

import { drawBoxes, readBoxes } from "./boxes.js";
import { bar, make, percent } from "./dom.js";
import { shares } from "./experts.js";
import { image } from "./pictures.js";
import { Strip } from "./strip.js";
import { TokenText } from "./tokens.js";

// of what was asked, that is shown in a frame of its own
const LONG = 600;
const INSTANT = 0.05; // seconds

export class Column {
  /* `onPoint` gets a token with its place and layer. */
  constructor(looks, reader, title, onPoint) {
    this.looks = looks;
    this.reader = reader; // as a request names it
    this.onPoint = onPoint;
    this.picked = null;
    this.messages = []; // of a chat that goes on
    this.turns = [];
    this.facts = make("p", { class: "facts" });
    this.body = make("div");
    this.problem = make("div");
    const heading = make("h2", {}, title);
    this.element = make("article", { class: "column", "aria-label": title });
    this.element.append(heading, this.facts, this.problem, this.body);
  }

  /* Forget what was said. */
  clear() {
    this.messages = [];
    this.turns = [];
    this.body.replaceChildren();
    this.problem.replaceChildren();
    this.facts.textContent = "";
  }

  /* Ask, and show what comes; throws a Refusal, or what the signal was aborted with. */
  async ask(server, request, signal) {
    this.problem.replaceChildren();
    // what a fault broke off is asked anew, and no part of the chat
    this.turns.filter((each) => each.broken).forEach((each) => this.#remove(each));
    const turn = this.#turn(request);
    const began = performance.now();
    let first = null;
    let finish = null;
    let usage = null;
    turn.text.element.classList.add("writing");
    const tell = (ending) => this.#tell(turn, { began, first, usage, ending, seed: request.seed });
    try {
      for await (const event of server.events(request.path, request.body, signal)) {
        const [choice] = event.choices;
        if (event.alternatives) this.#chances(turn, event);
        usage = event.usage ?? usage;
        if (!choice) continue;
        const text = choice.text ?? choice.delta?.content ?? "";
        const tokens = choice.experts?.tokens ?? [];
        if (text && first === null) first = performance.now();
        if (text || tokens.length) turn.add(text, tokens);
        finish = choice.finish_reason ?? finish;
        tell(null);
      }
      tell(finish === "length" ? "reached max tokens" : "came to its end");
    } catch (error) {
      turn.broken = !signal.aborted;
      tell(signal.aborted ? "stopped" : "broken off");
      throw error;
    } finally {
      turn.text.element.classList.remove("writing");
      this.#end(turn, request);
    }
    return turn.text.text;
  }

  /* Show who reads a prompt, or who answers a request. */
  showRoute(asked, found) {
    this.clear();
    const turn = this.#turn({ ...asked, asked: found.tokens ? "" : asked.asked });
    if (found.tokens) {
      for (const token of found.tokens) turn.add(token.text, [token]);
      this.facts.textContent = `${found.tokens.length} tokens of the prompt, each with who reads it`;
    } else {
      this.#chances(turn, found);
      this.facts.textContent = "where the request goes; nothing was generated";
    }
    this.#end(turn, { chat: false });
  }

  refuse(notice) {
    this.problem.replaceChildren(notice);
  }

  pick(name) {
    this.picked = name;
    for (const turn of this.turns) turn.text.pick(name);
  }

  leave() {
    for (const turn of this.turns) turn.text.leave();
  }

  repaint() {
    for (const turn of this.turns) turn.strip.paint();
  }

  #turn({ asked, pictures, chat }) {
    const element = make("div", { class: chat ? "turn chat" : "turn" });
    const frames = pictures.map((picture) => make("div", { class: "seen" }, image(picture)));
    element.append(...frames);
    const place = (i, layer = -1) => {
      strip.point(i, layer);
      if (i >= 0) this.onPoint(text.tokens[i], i, layer);
    };
    const text = new TokenText(this.looks, "Tokens of the text; arrows move over them", place);
    const strip = new Strip(this.looks, (i, layer, pin) => {
      if (text.pinned && !pin && i !== text.pointed) return;
      text.point(i, pin);
      place(i, layer);
    });
    text.pick(this.picked);
    const chances = make("div", { class: "chosen" });
    const told = make("div");
    // what goes on with a text stands in one line with it
    const flows = !chat && asked.length <= LONG;
    const before = make(flows ? "span" : "p", { class: "asked" }, asked);
    const said = make("div", { class: flows ? "flow" : null }, before, text.element);
    said.insertBefore(chances, flows ? before : text.element);
    before.hidden = asked === "";
    element.append(said, strip.element, told);
    const add = (more, tokens) => {
      text.add(more, tokens);
      strip.add(tokens);
    };
    const turn = { element, text, strip, chances, told, frames, add };
    this.turns.push(turn);
    this.body.append(element);
    return turn;
  }

  /* Tell how far it is. */
  #tell(turn, { began, first, usage, ending, seed }) {
    const count = usage?.completion_tokens ?? turn.text.tokens.length;
    const facts = [`${count} tokens`];
    if (first !== null) {
      facts.push(`first after ${((first - began) / 1000).toFixed(2)} s`);
      const seconds = (performance.now() - first) / 1000;
      // what came at once has no rate
      if (count > 1 && seconds > INSTANT) facts.push(`${((count - 1) / seconds).toFixed(1)} tokens/s`);
    }
    if (usage) facts.push(`prompt of ${usage.prompt_tokens}`);
    if (seed !== undefined) facts.push(`seed ${seed}`);
    if (ending) facts.push(ending);
    this.facts.textContent = facts.join(" · ");
  }

  /* Show how likely the router found each expert, and who answers: of one that found none of them
     fit the base, of one that was not sure several. */
  #chances(turn, { expert, alternatives, answered_by: answering = [expert] }) {
    const rows = [];
    for (const { expert: name, probability } of alternatives) {
      const chosen = answering.includes(name) ? "first" : null;
      rows.push(make("span", { class: chosen }, name));
      rows.push(bar([[probability, this.looks.of(name)]]));
      rows.push(make("span", { class: chosen }, percent(probability)));
    }
    turn.chances.replaceChildren(
      make("h3", {}, "Whom the router chooses"),
      make("div", { class: "chances" }, ...rows),
      make("p", { class: "hint" }, `Answered by ${answering.join(" and ")}.`),
    );
  }

  #remove(turn) {
    turn.element.remove();
    this.turns = this.turns.filter((each) => each !== turn);
  }

  #end(turn, { chat, messages }) {
    const { text, strip } = turn;
    if (!text.text && !turn.chances.hasChildNodes()) {
      // it was refused: what was asked is in the form still
      this.#remove(turn);
      return;
    }
    const found = shares(text.tokens, this.looks);
    const rows = [];
    for (const [name, share] of found) {
      rows.push(make("span", {}, name), bar([[share, this.looks.of(name)]]));
      rows.push(make("span", {}, percent(share)));
    }
    if (rows.length) {
      const title = make("h3", {}, "Who spoke, by weight");
      turn.told.replaceChildren(title, make("div", { class: "shares" }, ...rows));
    } else if (text.tokens.length) {
      turn.told.replaceChildren(make("p", { class: "hint" }, "A dense model: no experts in it."));
    }
    const spoken = found.map(([name, share]) => `${name} ${percent(share)}`).join(", ");
    strip.describe(`Experts of ${strip.layers} layers by ${text.tokens.length} tokens: ${spoken}`);
    if (chat && text.text && !turn.broken) {
      this.messages = [...messages, { role: "assistant", content: text.text }];
    }
    const boxes = turn.frames.length ? readBoxes(text.text) : null;
    if (boxes?.length) drawBoxes(turn.frames[0], boxes);
  }
}
