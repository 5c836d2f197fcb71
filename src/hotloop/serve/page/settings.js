// The settings: a chat's options, and how the page looks.

import { newSeed } from "./answer.js";
import { byId, setIcon } from "./dom.js";
import { recall, remember } from "./store.js";

const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];

/** The form of a chat's options. */
export class OptionsForm {
  #form = byId("settings-form");

  /** @param {(options: object) => void} changed Is told of options that the user has changed. */
  constructor(changed) {
    const edited = () => {
      this.show(this.options);
      changed(this.options);
    };
    this.#form.addEventListener("input", (event) => this.#take(event.target.name));
    this.#form.addEventListener("change", edited);
    this.#form.addEventListener("submit", (event) => event.preventDefault());
    byId("reroll").addEventListener("click", () => {
      this.options.seed = newSeed();
      edited();
    });
    byId("lock").addEventListener("click", () => {
      this.options.locked = !this.options.locked;
      if (this.options.locked) this.options.seed ??= newSeed();
      edited();
    });
  }

  /** Displays a chat's options, which are changed in place. */
  show(options) {
    this.options = options;
    for (const name of ["system", ...NUMBERS]) this.#form.elements[name].value = options[name] ?? "";
    const lock = byId("lock");
    lock.setAttribute("aria-pressed", options.locked);
    setIcon(lock, options.locked ? "locked" : "unlocked");
    byId("seed-hint").textContent = options.locked
      ? "Kept: the same prompt and options give the same answer."
      : "Each answer draws a new one. Lock it to get the same answer again.";
  }

  focus() {
    this.#form.elements.system.focus({ preventScroll: true });
  }

  #take(changed) {
    const { options } = this;
    options.system = this.#form.elements.system.value;
    for (const name of NUMBERS) {
      const { valueAsNumber, validity } = this.#form.elements[name];
      if (validity.valid) options[name] = Number.isNaN(valueAsNumber) ? null : valueAsNumber;
    }
    if (changed === "seed") options.locked = options.seed !== null; // a seed that is typed is kept
  }
}

const THEMES = { auto: "light dark", light: "light", dark: "dark" };
const THEME_NAMES = { auto: "as the system", light: "light", dark: "dark" };

/** Applies the stored theme and the shading of drafts, and handles the controls that change them. */
export function applyAppearance() {
  const shade = byId("shade");
  shade.checked = recall("shade") !== "no";
  const showShade = () => document.documentElement.classList.toggle("shade", shade.checked);
  shade.addEventListener("change", () => {
    remember("shade", shade.checked ? "yes" : "no");
    showShade();
  });
  const theme = () => (recall("theme") in THEMES ? recall("theme") : "auto");
  const showTheme = () => {
    document.documentElement.style.colorScheme = THEMES[theme()];
    const label = `Theme: ${THEME_NAMES[theme()]}`;
    byId("theme").setAttribute("aria-label", label);
    byId("theme").title = label;
  };
  byId("theme").addEventListener("click", () => {
    const names = Object.keys(THEMES);
    remember("theme", names[(names.indexOf(theme()) + 1) % names.length]);
    showTheme();
  });
  showShade();
  showTheme();
}
