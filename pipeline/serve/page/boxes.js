/* Boxes in an answer, read as the report reads them (metrics/answers.py; a test holds both against
   each other), and drawn over the picture. */

import { make } from "./dom.js";

const LARGEST = 1000; // thousandths of the picture's sides

/* Return [{label, corners}] of the boxes of a JSON text; null where it holds anything else. */
export function readBoxes(text) {
  const bare = text.trim().replace(/^```[a-z]*\s*|\s*```$/g, "");
  let given;
  try {
    given = JSON.parse(bare);
  } catch {
    return null;
  }
  if (isObject(given)) given = [given];
  if (!Array.isArray(given)) return null;
  if (given.length && !Array.isArray(given[0]) && !isObject(given[0])) given = [given];
  const boxes = given.map(box);
  return boxes.includes(null) ? null : boxes;
}

function box(entry) {
  const label = isObject(entry) ? String(entry.label ?? "") : "";
  const corners = isObject(entry) ? entry.bbox_2d : entry;
  if (!Array.isArray(corners) || corners.length !== 4) return null;
  const fits = (x) => typeof x === "number" && x >= 0 && x <= LARGEST;
  return corners.every(fits) ? { label, corners } : null;
}

function isObject(value) {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/* Draw boxes over a picture's element. */
export function drawBoxes(frame, boxes) {
  for (const { label, corners } of boxes) {
    const [left, top, right, bottom] = corners;
    const drawn = make("div", { class: "box", role: "img" });
    drawn.setAttribute("aria-label", `box ${label || "without a label"} at ${corners.join(", ")}`);
    drawn.style.left = `${left / 10}%`;
    drawn.style.top = `${top / 10}%`;
    drawn.style.width = `${Math.max(0, right - left) / 10}%`;
    drawn.style.height = `${Math.max(0, bottom - top) / 10}%`;
    if (label) drawn.append(make("span", {}, label));
    frame.append(drawn);
  }
}
