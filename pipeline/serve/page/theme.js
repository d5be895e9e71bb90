/* Light or dark: as the system has it, or as a person chose for this page. */

const KEPT = "moleforge-colours";

/* Follow a choice; `onChange` is called whenever the page's colours have changed. */
export function followTheme(select, onChange) {
  const root = document.documentElement;
  const set = (value) => {
    if (value) root.dataset.theme = value;
    else delete root.dataset.theme;
    onChange();
  };
  select.value = kept();
  set(select.value);
  select.addEventListener("change", () => {
    keep(select.value);
    set(select.value);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", onChange);
}

function kept() {
  try {
    const value = localStorage.getItem(KEPT);
    return value === "light" || value === "dark" ? value : "";
  } catch {
    return "";
  }
}

function keep(value) {
  try {
    localStorage.setItem(KEPT, value);
  } catch {
    // some browsers forbid it; the choice is for this time then
  }
}
