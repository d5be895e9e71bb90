/* Elements made of text alone: nothing that a server, a link or a person says is read as markup. */

export const at = (id) => document.getElementById(id);

/* Return an element with attributes; null, undefined and false leave one out. */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

/* Return a bar cut into pieces: [share of its length in 0..1, class, title]. */
export function bar(pieces) {
  const drawn = make("span", { class: "bar", "aria-hidden": "true" });
  for (const [share, look, title] of pieces) {
    const piece = make("i", { class: look, title });
    // by the object model: the page's policy allows no style in markup
    piece.style.width = `${100 * Math.min(1, Math.max(0, share))}%`;
    drawn.append(piece);
  }
  return drawn;
}

export const percent = (share) => `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`;
