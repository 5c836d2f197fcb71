// How messages look, and what can be done with each.

import { isOpen } from "./answer.js";
import { copyButton, element, fitHeight, iconButton } from "./dom.js";
import { renderMarkdown } from "./markdown.js";

/**
 * A message on the page. `update()` displays what has changed of it.
 *
 * @param {object} message
 * @param {object} actions What the buttons do: `edit(text)`, `remove()`, and of answers
 *   `regenerate()`, `continue()`, `useSeed()`, `askForKey()`.
 */
export class MessageView {
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    this.node = element("li", { class: `message ${message.role}` });
    if (message.role === "user") this.#buildQuestion();
    else this.#buildAnswer();
    this.update();
  }

  update() {
    if (this.editor) return;
    if (this.message.role === "user") this.text.textContent = this.message.content;
    else this.#updateAnswer();
  }

  /** Replaces the text by a field to edit it in. */
  edit() {
    const { message } = this;
    const isQuestion = message.role === "user";
    const area = element("textarea", {
      "aria-label": isQuestion ? "Edit the message" : "Edit the answer",
      input: () => fitHeight(area),
      keydown: (event) => {
        if (event.key === "Escape") {
          event.stopPropagation();
          close();
        } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing && isQuestion) {
          event.preventDefault();
          this.editor.requestSubmit();
        }
      },
    });
    const close = () => {
      this.editor.remove();
      this.editor = null;
      this.node.classList.remove("editing");
      this.update();
      this.node.querySelector(".actions button")?.focus();
    };
    area.value = message.content;
    this.editor = element(
      "form",
      {
        class: "editor",
        submit: (event) => {
          event.preventDefault();
          if (isQuestion && !area.value.trim()) return;
          close();
          this.actions.edit(area.value);
        },
      },
      area,
      element(
        "div",
        { class: "buttons" },
        element("button", { type: "button", class: "quiet", click: close }, "Cancel"),
        element("button", { type: "submit", class: "primary" }, isQuestion ? "Send" : "Save"),
      ),
    );
    this.node.classList.add("editing");
    this.node.prepend(this.editor);
    fitHeight(area);
    area.focus();
  }

  #buildQuestion() {
    this.text = element("div", { class: "bubble" });
    this.node.append(
      element("span", { class: "hidden" }, "You:"),
      this.text,
      element(
        "div",
        { class: "actions" },
        copyButton("Copy the message", () => this.message.content),
        iconButton("edit", "Edit the message, and send it again", () => this.edit()),
        iconButton("delete", "Delete the message", () => this.actions.remove()),
      ),
    );
  }

  #buildAnswer() {
    const { actions } = this;
    this.thoughtLabel = element("summary", { click: () => (this.unfoldedByUser = true) });
    this.thoughts = element("div", { class: "prose" });
    this.thought = element("details", { class: "thought" }, this.thoughtLabel, this.thoughts);
    this.text = element("div", { class: "prose" });
    this.waiting = element("div", { class: "waiting" }, element("span", { class: "hidden" }, "Waiting"));
    this.notice = element("div", { class: "notice" });
    this.stats = element("ul", { class: "stats", "aria-label": "Statistics of this answer" });
    this.continue = iconButton("continue", "Continue the answer", () => actions.continue());
    this.copy = copyButton("Copy the answer", () => this.message.content);
    this.buttons = element(
      "div",
      { class: "actions" },
      this.copy,
      iconButton("regenerate", "Regenerate the answer", () => actions.regenerate()),
      this.continue,
      iconButton("edit", "Edit the answer", () => this.edit()),
      iconButton("delete", "Delete the answer", () => actions.remove()),
    );
    this.node.append(
      element("span", { class: "hidden" }, "Answer:"),
      this.thought,
      this.text,
      this.waiting,
      this.notice,
      element("div", { class: "under" }, this.buttons, this.stats),
    );
  }

  #updateAnswer() {
    const { message } = this;
    const open = isOpen(message);
    const { content, reasoning, drafted, stats } = message;
    this.node.classList.toggle("open", open);
    this.node.setAttribute("aria-busy", open);
    this.waiting.hidden = message.state !== "waiting" || content !== "";
    this.thought.hidden = !reasoning;
    if (reasoning) {
      const thinks = open && !content;
      if (!this.unfoldedByUser) this.thought.open = thinks;
      const took = stats.thought_s === undefined ? "" : ` for ${seconds(stats.thought_s)}`;
      this.thoughtLabel.textContent = thinks ? "Thinking…" : `Thought${took}`;
      renderMarkdown(this.thoughts, reasoning, drafted.reasoning, thinks);
    }
    renderMarkdown(this.text, content, drafted.content, open);
    this.buttons.hidden = open;
    this.copy.hidden = !content;
    this.continue.hidden = !content || message.state === "done";
    this.#updateNotice();
    this.stats.replaceChildren(...describe(message, () => this.actions.useSeed()));
  }

  #updateNotice() {
    const { actions, message } = this;
    const text = {
      length: "The answer reached its limit of tokens.",
      stopped: "Stopped.",
      edited: "Edited.",
      lost: message.error,
      failed: message.error,
    }[message.state];
    this.notice.hidden = !text;
    if (!text || this.notice.dataset.text === text) return;
    this.notice.dataset.text = text;
    const bad = message.state === "lost" || message.state === "failed";
    this.notice.className = bad ? "notice bad" : "notice";
    if (bad) this.notice.setAttribute("role", "alert");
    else this.notice.removeAttribute("role");
    const button = (label, click) => element("button", { type: "button", click }, label);
    this.notice.replaceChildren(
      element("span", {}, text),
      ...(message.content ? [button("Continue", () => actions.continue())] : []),
      ...(bad && !message.content ? [button("Try again", () => actions.regenerate())] : []),
      ...(message.error.includes("API key") ? [button("Enter a key", () => actions.askForKey())] : []),
    );
  }
}

/** Returns what is known of an answer's speed and tokens, as items of a list. */
function describe({ stats, state, seed }, useSeed) {
  const items = [];
  const add = (title, ...children) => items.push(element("li", { title }, ...children));
  if (stats.decode_tok_s) {
    add("Decoding speed: tokens per second, after the first token", "decode ", strong(decimals(stats.decode_tok_s)), " tok/s");
  }
  if (stats.ttft_s !== undefined) {
    add("Time to first token, from sending to its arrival here", "TTFT ", strong(seconds(stats.ttft_s)));
  }
  if (stats.tokens) add("Tokens of the answer", strong(count(stats.tokens)), stats.tokens === 1 ? " token" : " tokens");
  if (stats.accepted) {
    const share = Math.round((100 * stats.accepted) / stats.tokens);
    add(
      `${count(stats.accepted)} of ${count(stats.tokens)} tokens were drafted, and the model confirmed them`,
      element("span", { class: "drafted" }, `${share} %`),
      " drafted",
    );
  }
  if (stats.cached_tokens) {
    add(
      `${count(stats.cached_tokens)} of the prompt's ${count(stats.prompt_tokens)} tokens were still in the cache`,
      strong(`${count(stats.cached_tokens)}/${count(stats.prompt_tokens)}`),
      " cached",
    );
  }
  if (seed !== null && stats.tokens && state !== "waiting" && state !== "streaming") {
    const use = element("button", { type: "button", class: "link", click: useSeed }, `seed ${seed}`);
    add("Keep this seed: the same prompt and options then give the same answer", use);
  }
  if (stats.same === 1) add("Identical to the previous answer", element("span", { class: "same" }, "same answer"));
  if (stats.same === 0) add("The previous answer had a different text", "different answer");
  return items;
}

const strong = (text) => element("b", {}, text);

export const count = (n) => n.toLocaleString("en");

const decimals = (x) => (x < 9.95 ? x.toFixed(1) : count(Math.round(x)));

function seconds(s) {
  if (s < 0.00995) return `${(1000 * s).toFixed(1)} ms`;
  return s < 0.9995 ? `${Math.round(1000 * s)} ms` : `${s.toFixed(1)} s`;
}
