// Short messages: on the page for a while, or for screen readers only.

import { byId, element } from "./dom.js";

const TOAST_MS = 8000;

/** Displays a message for some seconds, with a button that does `action`. */
export function toast(text, label = null, action = null) {
  const note = element("div", { class: "toast" }, element("span", {}, text));
  const close = () => note.remove();
  if (action) {
    const act = () => {
      close();
      action();
    };
    note.append(element("button", { type: "button", click: act }, label));
  }
  byId("toasts").replaceChildren(note);
  setTimeout(close, TOAST_MS);
}

export function dismissToasts() {
  byId("toasts").replaceChildren();
}

/** Has screen readers say a message. */
export function announce(text) {
  byId("announcer").textContent = text;
}
