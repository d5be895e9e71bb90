/* How experts look: a colour each, beyond eight with another line; and the legend that names them. */

import { make } from "./dom.js";

const COLOURS = 8;
const LINES = 4;
export const BASE = "base";

export class Looks {
  constructor(names) {
    this.names = names; // in the order of the numbers that tokens have
    this.classes = new Map();
    this.fills = new Map();
    let number = 0;
    for (const name of names) {
      // who is no expert has the colour of what is not written by one
      if (name === BASE) continue;
      const line = Math.floor(number / COLOURS) % LINES;
      this.classes.set(name, `c${number % COLOURS} l${line}`);
      number += 1;
    }
    this.probe = make("i", { hidden: true });
    document.body.append(this.probe);
  }

  name(number) {
    return this.names[number] ?? BASE;
  }

  of(name) {
    return this.classes.get(name) ?? "";
  }

  /* Return the red, green and blue of an expert as the page shows it now. */
  fill(name) {
    if (!this.fills.has(name)) {
      this.probe.className = this.of(name);
      this.fills.set(name, this.#resolved("var(--key)"));
    }
    return this.fills.get(name);
  }

  get paper() {
    if (!this.fills.has(null)) {
      this.fills.set(null, this.#resolved("var(--paper)"));
    }
    return this.fills.get(null);
  }

  /* Have colours looked up again: the page has turned light or dark. */
  changed() {
    this.fills.clear();
  }

  #resolved(colour) {
    this.probe.style.color = colour;
    return getComputedStyle(this.probe).color.match(/[\d.]+/g).slice(0, 3).map(Number);
  }
}

/* The experts by name, with what else is known of each; one that is pressed is shown alone. `onPick`
   gets its name, or null. */
export class Legend {
  constructor(element, looks, known, onPick) {
    this.element = element;
    this.picked = null;
    const buttons = [];
    for (const name of looks.names) {
      const key = make("span", { class: `key ${looks.of(name)}`, "aria-hidden": "true" });
      const told = { type: "button", "aria-pressed": "false", title: known.get(name) };
      const button = make("button", told, key, name);
      button.addEventListener("click", () => {
        this.picked = this.picked === name ? null : name;
        for (const each of buttons) {
          each.setAttribute("aria-pressed", String(each === button && this.picked === name));
        }
        onPick(this.picked);
      });
      buttons.push(button);
    }
    element.replaceChildren(...buttons);
  }
}

/* Return [name, share] of the weight that each expert has over tokens and layers, most first. */
export function shares(tokens, looks) {
  const total = new Map();
  let all = 0;
  for (const token of tokens) {
    token.experts.forEach((numbers, layer) => {
      numbers.forEach((number, place) => {
        const weight = token.weights[layer][place];
        const name = looks.name(number);
        total.set(name, (total.get(name) ?? 0) + weight);
        all += weight;
      });
    });
  }
  return [...total].map(([name, sum]) => [name, sum / all]).sort((a, b) => b[1] - a[1]);
}
