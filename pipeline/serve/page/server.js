/* The server's public interface: who can be asked, where a text goes, answers as they come. */

const KEY = "moleforge-key";

/* The codes of a server that takes nothing more just now. */
const BUSY = ["overloaded", "stopping", "loading"];

/* What kept an answer from coming: the server's own sentence, and what it is about. */
export class Refusal extends Error {
  constructor(message, { status = 0, param = null, code = null, seconds = null } = {}) {
    super(message);
    this.status = status; // 0: no answer at all
    this.param = param;
    this.code = code;
    this.seconds = seconds; // after which it may be tried again
  }

  /* What to do about it, where the sentence does not say so. */
  get advice() {
    if (this.status === 401) return "Enter the key that this server was started with.";
    if (this.isBusy) {
      const when = this.seconds === null ? "in a moment" : `in ${this.seconds} s`;
      return `Nothing is wrong with what was asked. It can be tried again ${when}.`;
    }
    if (this.status === 0) return "See whether the server still runs, and try again.";
    if (this.status === 413) return "Take smaller pictures or a shorter text.";
    if (this.status >= 500) return "That is a fault of the server. Try again, or ask otherwise.";
    return "";
  }

  /* Whether the server takes nothing more just now. */
  get isBusy() {
    return this.status === 429 || this.status === 503;
  }

  get passes() {
    return this.status === 0 || this.isBusy || this.status >= 500;
  }
}

export class Server {
  constructor(base) {
    this.base = base;
    this.kept = ""; // where the tab may store nothing
  }

  /* Of this tab alone: neither in the address nor where another tab could read it. */
  get key() {
    try {
      return sessionStorage.getItem(KEY) ?? "";
    } catch {
      return this.kept;
    }
  }

  set key(value) {
    this.kept = value;
    try {
      if (value) sessionStorage.setItem(KEY, value);
      else sessionStorage.removeItem(KEY);
    } catch {
      // some browsers forbid it; then the page alone remembers it
    }
  }

  /* Return the models that can be named, the stack first. */
  async models() {
    const answer = await this.#ask("GET", "v1/models");
    return (await answer.json()).data;
  }

  /* Return where a text or a request goes. */
  async route(body, signal) {
    const answer = await this.#ask("POST", "v1/route", body, signal);
    return answer.json();
  }

  /* Yield what a stream says, event by event; to stop reading frees its place. */
  async *events(path, body, signal) {
    const answer = await this.#ask("POST", path, body, signal);
    for await (const data of dataLines(answer.body)) {
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw refusalOf(event, statusOf(event.error), null);
      yield event;
    }
    throw new Refusal("The server ended the answer before it was whole.");
  }

  async #ask(method, path, body, signal) {
    const headers = {};
    // a key of other characters is no header
    if (this.key) headers.Authorization = `Bearer ${this.key.replace(/[^\x21-\x7e]/g, "")}`;
    if (body) headers["Content-Type"] = "application/json";
    let answer;
    try {
      answer = await fetch(new URL(path, this.base), {
        method,
        headers,
        body: body && JSON.stringify(body),
        signal,
        credentials: "same-origin",
        cache: "no-store",
      });
    } catch (error) {
      if (signal?.aborted) throw error;
      throw new Refusal("The server does not answer.");
    }
    if (answer.ok) return answer;
    const told = await answer.json().catch(() => null);
    throw refusalOf(told, answer.status, answer.headers.get("Retry-After"));
  }
}

/* Return the error that an answer tells; what stands before a server may answer in other forms. */
function refusalOf(told, status, after) {
  const error = typeof told?.error === "object" && told.error !== null ? told.error : {};
  const message = error.message ?? `The server answered with status ${status}.`;
  const seconds = /^\d+$/.test(after ?? "") ? Number(after) : null;
  const { param = null, code = null } = error;
  return new Refusal(String(message), { status, param, code, seconds });
}

/* Return the status that an error in the middle of a stream would have had: a 200 went before. */
function statusOf({ code, type }) {
  if (BUSY.includes(code)) return 503;
  return type === "invalid_request_error" ? 400 : 500;
}

/* Yield the data of server-sent events. */
async function* dataLines(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let left = "";
  try {
    while (true) {
      const { done, value } = await reader.read();
      if (done) return;
      // an event ends with an empty line, which may come in two pieces
      const blocks = (left + value).split(/\r?\n\r?\n/);
      left = blocks.pop();
      for (const block of blocks) {
        const lines = block.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
