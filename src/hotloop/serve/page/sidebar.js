// The list of chats.

import { byId, element, iconButton } from "./dom.js";

/**
 * Displays the list.
 *
 * @param {object[]} chats
 * @param {?string} current The id of the chat that is displayed.
 * @param {Set<string>} busy The ids of those whose answer is being generated.
 * @param {object} actions `open(id)`, `rename(id, title)`, `save(id)` (to a file), `remove(id)`.
 */
export function showChats(chats, current, busy, actions) {
  byId("chats").replaceChildren(...chats.map((chat) => item(chat, chat.id === current, busy, actions)));
}

function item(chat, isCurrent, busy, actions) {
  const title = element("span", { class: "title" }, chat.title);
  const open = element(
    "button",
    {
      type: "button",
      class: "open",
      title: chat.title,
      "aria-current": isCurrent ? "true" : null,
      click: () => actions.open(chat.id),
      dblclick: () => rename(node, chat, actions),
    },
    title,
  );
  if (busy.has(chat.id)) open.append(element("span", { class: "busy", role: "img", "aria-label": "answering" }));
  const node = element(
    "li",
    { class: isCurrent ? "current" : null },
    open,
    element(
      "div",
      { class: "actions" },
      iconButton("edit", `Rename “${chat.title}”`, () => rename(node, chat, actions)),
      iconButton("export", `Export “${chat.title}”`, () => actions.save(chat.id)),
      iconButton("delete", `Delete “${chat.title}”`, () => actions.remove(chat.id)),
    ),
  );
  return node;
}

function rename(node, chat, actions) {
  let done = false;
  const finish = (keep) => {
    if (done) return;
    done = true;
    actions.rename(chat.id, (keep && field.value.trim()) || chat.title);
  };
  const field = element("input", {
    class: "rename",
    "aria-label": "Name of the chat",
    maxlength: "200",
    blur: () => finish(true),
    keydown: (event) => {
      if (event.isComposing) return;
      if (event.key === "Enter") finish(true);
      if (event.key === "Escape") {
        event.stopPropagation();
        finish(false);
      }
    },
  });
  field.value = chat.title;
  node.replaceChildren(field);
  field.select();
  field.focus();
}
