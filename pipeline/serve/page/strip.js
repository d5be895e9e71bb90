/* Layers by tokens: a column for each token, a row for each layer, in the colour of its expert.

One pixel each, which the browser makes larger: a thousand tokens of thirty layers cost a moment. */

import { make } from "./dom.js";

const WIDTH = 9; // of a token, on the screen
const HEIGHT = 150; // of all layers
// a weight of nearly nothing is still seen
const FAINTEST = 0.3;

export class Strip {
  /* `onPoint` gets a token's number and a layer's. */
  constructor(looks, onPoint) {
    this.looks = looks;
    this.tokens = [];
    this.layers = 0;
    this.canvas = make("canvas", { role: "img", width: "1", height: "1" });
    this.mark = make("i", { hidden: true });
    // to be scrolled from the keyboard too
    const reached = { class: "strip", tabindex: "0", role: "group", "aria-label": "Layers by tokens" };
    this.frame = make("div", reached, make("div", {}, this.canvas, this.mark));
    this.axis = make("p", { class: "axis" });
    this.element = make("div", { hidden: true }, this.frame, this.axis);
    this.due = false;
    this.canvas.addEventListener("pointermove", (event) => onPoint(...this.#place(event), false));
    this.canvas.addEventListener("click", (event) => onPoint(...this.#place(event), true));
  }

  add(tokens) {
    this.tokens.push(...tokens);
    for (const token of tokens) this.layers = Math.max(this.layers, token.experts.length);
    this.paint();
  }

  /* Paint before the next frame, however many tokens come until then. */
  paint() {
    if (this.due || !this.layers) return;
    this.due = true;
    requestAnimationFrame(() => {
      this.due = false;
      this.#paint();
    });
  }

  /* Mark a token, and one of its layers where it is known; -1 marks none. */
  point(i, layer = -1) {
    this.mark.hidden = i < 0 || !this.layers;
    if (this.mark.hidden) return;
    const left = i * WIDTH;
    this.mark.style.left = `${left - 1}px`;
    this.mark.style.width = `${WIDTH + 2}px`;
    this.mark.style.top = layer < 0 ? "0" : `${layer * this.#height}px`;
    this.mark.style.bottom = layer < 0 ? "0" : "auto";
    this.mark.style.height = layer < 0 ? "auto" : `${this.#height}px`;
    const { scrollLeft, clientWidth } = this.frame;
    if (left < scrollLeft || left + WIDTH > scrollLeft + clientWidth) {
      this.frame.scrollLeft = left - clientWidth / 2;
    }
  }

  /* Say in words what it shows. */
  describe(text) {
    this.canvas.setAttribute("aria-label", text);
  }

  get #height() {
    return Math.max(4, Math.min(16, Math.round(HEIGHT / this.layers)));
  }

  #place(event) {
    const box = this.canvas.getBoundingClientRect();
    const token = Math.floor((event.clientX - box.left) / WIDTH);
    const layer = Math.floor((event.clientY - box.top) / this.#height);
    const last = this.tokens.length - 1;
    return [Math.max(0, Math.min(last, token)), Math.max(0, Math.min(this.layers - 1, layer))];
  }

  #paint() {
    const columns = this.tokens.length;
    const follows = this.frame.scrollLeft + this.frame.clientWidth >= this.frame.scrollWidth - WIDTH;
    this.element.hidden = false;
    this.canvas.width = columns;
    this.canvas.height = this.layers;
    this.canvas.style.width = `${columns * WIDTH}px`;
    this.canvas.style.height = `${this.layers * this.#height}px`;
    const image = new ImageData(columns, this.layers);
    const paper = this.looks.paper;
    this.tokens.forEach((token, column) => {
      token.experts.forEach((numbers, layer) => {
        if (!numbers.length) return;
        const weights = token.weights[layer];
        const total = weights.reduce((sum, weight) => sum + weight, 0) || 1;
        const strength = FAINTEST + (1 - FAINTEST) * (weights[0] / total);
        const fill = this.looks.fill(this.looks.name(numbers[0]));
        const start = 4 * (layer * columns + column);
        for (let part = 0; part < 3; part += 1) {
          image.data[start + part] = paper[part] + strength * (fill[part] - paper[part]);
        }
        image.data[start + 3] = 255;
      });
    });
    this.canvas.getContext("2d").putImageData(image, 0, 0);
    const layers = this.layers === 1 ? "one layer" : `layers 0 to ${this.layers - 1}, downwards`;
    const [from, to] = [layers, `${columns} tokens`];
    this.axis.replaceChildren(make("span", {}, from), make("span", {}, to));
    if (follows) this.frame.scrollLeft = this.frame.scrollWidth;
  }
}
