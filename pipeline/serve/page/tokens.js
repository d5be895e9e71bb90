/* A text made of tokens, each in its expert's colour; one of them can be pointed at. */

import { make, percent } from "./dom.js";
import { shares } from "./experts.js";

const NOBODY = "no expert"; // who spoke what a dense model wrote

let made = 0;

export class TokenText {
  /* `onPoint` gets the number of a token that is pointed at; -1: none is any more. */
  constructor(looks, label, onPoint) {
    this.looks = looks;
    this.onPoint = onPoint;
    this.id = `text${made++}`;
    this.tokens = [];
    this.spans = [];
    this.text = "";
    this.told = 0; // characters of the tokens so far
    this.pointed = -1;
    this.pinned = false;
    this.picked = null;
    this.label = label;
    this.list = make("span", { class: "tokens" });
    // what was said and has no token yet
    this.rest = make("span");
    this.element = make("div", { class: "text", dir: "auto" }, this.list, this.rest);
    this.#listen();
  }

  add(text, tokens) {
    this.text += text;
    // a list of nothing would be told as one
    if (tokens.length && !this.tokens.length) {
      this.list.setAttribute("role", "listbox");
      this.list.setAttribute("aria-label", this.label);
      this.list.tabIndex = 0;
    }
    this.list.append(...tokens.map((token) => this.#span(token)));
    this.rest.textContent = this.text.slice(this.told);
  }

  /* Show the tokens of one expert alone; null: of all. */
  pick(name) {
    this.picked = name;
    this.list.classList.toggle("alone", name !== null);
    this.spans.forEach((span, i) => span.classList.toggle("picked", this.#isPicked(this.tokens[i])));
  }

  /* Point at a token; a pinned one stays until another is chosen. */
  point(i, pin = false) {
    if (this.pinned && !pin) return;
    this.pinned = pin && i >= 0;
    this.spans[this.pointed]?.classList.remove("at");
    this.spans[this.pointed]?.removeAttribute("aria-selected");
    this.pointed = i;
    const span = this.spans[i];
    if (span) {
      span.classList.add("at");
      span.setAttribute("aria-selected", "true");
      this.list.setAttribute("aria-activedescendant", span.id);
    } else {
      this.list.removeAttribute("aria-activedescendant");
    }
    this.onPoint(i);
  }

  #span(token) {
    const number = this.tokens.length;
    this.tokens.push(token);
    this.told += token.text.length;
    const breaks = /^[\r\n]+$/.test(token.text) ? " breaks" : "";
    const span = make("span", {
      class: `token ${this.looks.of(token.top)}${breaks}`,
      id: `${this.id}-${number}`,
      role: "option",
      "aria-label": `${JSON.stringify(token.text)}, ${spoken(token, this.looks)}`,
    });
    span.textContent = token.text;
    span.dataset.number = number;
    span.classList.toggle("picked", this.#isPicked(token));
    this.spans.push(span);
    return span;
  }

  /* A dense model's tokens are nobody's, and are not shown with any expert's. */
  #isPicked(token) {
    return token.top !== null && token.top === this.picked;
  }

  #listen() {
    const numberAt = (event) => {
      const span = event.target.closest(".token");
      return span ? Number(span.dataset.number) : -1;
    };
    this.list.addEventListener("pointerover", (event) => {
      const i = numberAt(event);
      if (i >= 0) this.point(i);
    });
    this.list.addEventListener("click", (event) => {
      const i = numberAt(event);
      if (i >= 0) this.point(i, !(this.pinned && i === this.pointed));
    });
    this.list.addEventListener("keydown", (event) => this.#key(event));
    this.list.addEventListener("focus", () => {
      if (this.pointed < 0 && this.tokens.length) this.point(this.#next(-1, 1));
    });
  }

  #key(event) {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const last = this.tokens.length;
    const here = this.pointed;
    const places = {
      ArrowRight: () => this.#next(here, 1),
      ArrowLeft: () => this.#next(here, -1),
      ArrowDown: () => this.#line(here, 1),
      ArrowUp: () => this.#line(here, -1),
      Home: () => this.#next(-1, 1),
      End: () => this.#next(last, -1),
    };
    const place = places[event.key];
    if (!place || !last) return;
    event.preventDefault();
    const i = place();
    if (i < 0) return;
    this.pinned = false;
    this.point(i);
    this.spans[i].scrollIntoView({ block: "nearest" });
  }

  /* Point at none, and keep none. */
  leave() {
    this.pinned = false;
    this.point(-1);
  }

  /* Return the next token that shows something: of a character's several tokens the last one. */
  #next(i, step) {
    let found = i + step;
    while (this.tokens[found] && !this.tokens[found].text) found += step;
    return this.tokens[found] ? found : -1;
  }

  /* Return the token above or below. */
  #line(i, step) {
    const from = this.spans[i]?.getClientRects()[0];
    if (!from) return this.#next(-1, 1);
    let best = -1;
    let line = null;
    for (let j = this.#next(i, step); j >= 0; j = this.#next(j, step)) {
      const rect = this.spans[j].getClientRects()[0];
      const apart = (rect.top - from.top) * step;
      if (apart < from.height / 2) continue;
      if (line !== null && Math.abs(rect.top - line) > from.height / 2) break;
      line = rect.top;
      const away = Math.abs(rect.left - from.left);
      if (best < 0 || away <= Math.abs(this.spans[best].getClientRects()[0].left - from.left)) {
        best = j;
      }
    }
    return best;
  }
}

/* Return who spoke a token, in words. */
export function spoken(token, looks) {
  if (token.top === null) return NOBODY;
  const [first] = shares([token], looks).filter(([name]) => name === token.top);
  return first ? `${token.top} ${percent(first[1])}` : token.top;
}
