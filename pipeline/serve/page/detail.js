/* The token that is pointed at: who spoke it, layer by layer. */

import { bar, make, percent } from "./dom.js";
import { spoken } from "./tokens.js";

const NAMED = 2; // experts of a layer that are told by name; the rest is seen and in the bar's titles

export class Detail {
  /* `onClose` is called when a person has seen enough. */
  constructor(element, looks, onClose) {
    this.element = element;
    this.looks = looks;
    this.hint = element.querySelector(".hint");
    this.close = make("button", { type: "button", class: "quiet", "aria-label": "Close" }, "×");
    this.close.addEventListener("click", () => {
      this.empty();
      onClose();
    });
  }

  /* Show what it is for, and no token. */
  empty() {
    this.element.classList.remove("full");
    this.element.replaceChildren(this.hint);
  }

  /* Show a token; layer: the one that is pointed at, -1 for none. */
  show(token, place, layer = -1) {
    const code = make("code", { class: this.looks.of(token.top) }, shown(token.text));
    const facts = `token ${place + 1}, number ${token.id} of the vocabulary`;
    const rows = [];
    token.experts.forEach((numbers, i) => {
      const weights = token.weights[i];
      const total = weights.reduce((sum, weight) => sum + weight, 0) || 1;
      const pieces = [];
      const words = [];
      numbers.forEach((number, j) => {
        const name = this.looks.name(number);
        const share = weights[j] / total;
        pieces.push([share, this.looks.of(name), `${name} ${percent(share)}`]);
        if (j < NAMED) words.push(`${name} ${percent(share)}`);
      });
      const here = i === layer ? "here" : null;
      rows.push(make("span", { class: here }, `layer ${i}`), bar(pieces));
      rows.push(make("span", { class: here }, words.join(", ")));
    });
    const where = this.element.querySelector(".layers")?.scrollTop ?? 0;
    const reached = { class: "layers", tabindex: "0", role: "group", "aria-label": "Layers" };
    const layers = make("div", reached, ...rows);
    this.element.classList.add("full");
    this.element.replaceChildren(
      this.close,
      make("h2", {}, code, ` ${spoken(token, this.looks)}`),
      make("p", { class: "hint" }, facts),
      layers,
    );
    layers.scrollTop = where;
    layers.querySelector(".here")?.scrollIntoView?.({ block: "nearest" });
  }
}

/* Return a token's text with what would not be seen spelled out. */
function shown(text) {
  if (text === "") return "(part of a character)";
  const spelled = text.replaceAll("\n", "\\n").replaceAll("\t", "\\t").replaceAll("\r", "\\r");
  return spelled.replace(/^ +| +$/g, (blanks) => "␣".repeat(blanks.length));
}
