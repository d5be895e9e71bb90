/* Pictures that are asked about: dropped, pasted or chosen, and sent inside the request. */

import { make } from "./dom.js";

export class Pictures {
  /* `form` takes what is pasted anywhere in it. */
  constructor({ drop, list, pick, form, onProblem }) {
    this.list = list;
    this.pictures = [];
    this.enabled = false;
    this.onProblem = onProblem;
    pick.addEventListener("change", async () => {
      await this.take(pick.files);
      // the same file can be chosen again
      pick.value = "";
    });
    drop.addEventListener("dragover", (event) => {
      event.preventDefault();
      drop.classList.add("over");
    });
    drop.addEventListener("dragleave", () => drop.classList.remove("over"));
    // anywhere: a picture that is dropped beside its place would replace the page
    document.addEventListener("dragover", (event) => event.preventDefault());
    document.addEventListener("drop", (event) => {
      drop.classList.remove("over");
      if (!event.dataTransfer?.files.length) return;
      event.preventDefault();
      this.take(event.dataTransfer.files);
    });
    form.addEventListener("paste", (event) => {
      const files = [...(event.clipboardData?.files ?? [])];
      if (!this.enabled || !files.length) return;
      event.preventDefault();
      this.take(files);
    });
  }

  async take(files) {
    if (!this.enabled) return;
    for (const file of files) {
      if (file.type && !file.type.startsWith("image/")) {
        this.onProblem(`${file.name || "What came"} is no picture.`);
        continue;
      }
      const url = await dataUri(file);
      const picture = { name: file.name || "picture", url, shown: URL.createObjectURL(file) };
      this.pictures.push(picture);
      this.list.append(this.#item(picture));
    }
  }

  /* Have these asked about, and no others. */
  put(pictures) {
    this.pictures = [...pictures];
    this.list.replaceChildren(...this.pictures.map((picture) => this.#item(picture)));
  }

  #item(picture) {
    const remove = make("button", { type: "button", "aria-label": `Remove ${picture.name}` }, "×");
    const item = make("li", {}, image(picture), remove);
    remove.addEventListener("click", () => {
      this.pictures = this.pictures.filter((each) => each !== picture);
      item.remove();
    });
    return item;
  }
}

/* Return a picture's element; what a browser cannot show (HEIC, say) is told by its name. */
export function image(picture) {
  const shown = make("img", { src: picture.shown, alt: picture.name });
  shown.addEventListener("error", () => {
    shown.replaceWith(make("span", { class: "unshown" }, picture.name));
  });
  return shown;
}

function dataUri(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result));
    reader.addEventListener("error", () => reject(reader.error));
    reader.readAsDataURL(file);
  });
}
