/* What is asked and how: the form's fields, and the part of the address that holds them. */

import { at } from "./dom.js";

const NUMBERS = ["max_tokens", "temperature", "top_p", "top_k", "min_p", "seed"];
const TEXTS = ["prompt", "system", "stop_strings"];
const CHOICES = ["model", "beside"];
// a longer address is cut by what people send it through
const LONGEST = 8000;

/* Return the sampling that the form asks for, as the server's fields; what is empty is left out. */
export function sampling() {
  const fields = {};
  for (const name of NUMBERS) {
    if (at(name).value !== "") fields[name] = Number(at(name).value);
  }
  const stop = stopStrings(at("stop_strings").value);
  if (stop.length) fields.stop = stop;
  return fields;
}

/* Return a text's lines, with line breaks and tabs where they are spelled. */
export function stopStrings(text) {
  const spelled = { n: "\n", t: "\t", r: "\r", "\\": "\\" };
  const lines = text.split("\n").filter((line) => line !== "");
  return lines.map((line) => line.replace(/\\([ntr\\])/g, (_, kind) => spelled[kind]));
}

export function mode() {
  return document.querySelector("input[name=mode]:checked").value;
}

export function setMode(value) {
  for (const input of document.querySelectorAll("input[name=mode]")) {
    input.checked = input.value === value;
  }
}

/* Fill the form from an address. Nothing is sent for it: a link asks nothing in one's name. */
export function fromAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  for (const name of [...TEXTS, ...NUMBERS]) {
    if (given.has(name)) at(name).value = given.get(name);
  }
  for (const name of CHOICES) {
    const options = [...at(name).options].map((option) => option.value);
    if (options.includes(given.get(name))) at(name).value = given.get(name);
  }
  if (["completion", "chat"].includes(given.get("mode"))) setMode(given.get("mode"));
}

/* Put what the form holds into the address, without its key and its pictures. */
export function toAddress() {
  const held = new URLSearchParams();
  for (const name of [...TEXTS, ...NUMBERS, ...CHOICES]) {
    if (at(name).value !== "") held.set(name, at(name).value);
  }
  held.set("mode", mode());
  if (held.toString().length > LONGEST) held.delete("prompt");
  history.replaceState(null, "", `#${held}`);
}

/* Mark the field that a refusal is about, and go to it; false where there is none. */
export function markField(param) {
  clearMarks();
  const id = { stop: "stop_strings", messages: "prompt", text: "prompt" }[param] ?? param;
  const field = [...NUMBERS, ...TEXTS, ...CHOICES].includes(id) ? at(id) : null;
  if (!field) return false;
  field.setAttribute("aria-invalid", "true");
  field.closest("details")?.setAttribute("open", "");
  field.focus();
  return true;
}

export function clearMarks() {
  for (const field of document.querySelectorAll("[aria-invalid]")) {
    field.removeAttribute("aria-invalid");
  }
}
