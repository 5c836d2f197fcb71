// The server as the page's head displays it: its models, its state, and the key that it asks for.

import { ApiError } from "./api.js";
import { byId, element } from "./dom.js";

const MAX_WAIT_MS = 10_000; // between two questions to a server that does not answer

export class Server {
  #api;
  #models = [];
  #watching = false;

  /**
   * @param {Api} api
   * @param {object} calls `changed()`: the model is another one; `unlocked()`: there is a new key.
   */
  constructor(api, { changed, unlocked }) {
    this.#api = api;
    this.changed = changed;
    byId("models").addEventListener("change", changed);
    byId("key-form").addEventListener("submit", () => {
      api.key = byId("key").value.trim();
      this.watch();
      unlocked();
    });
    byId("key-cancel").addEventListener("click", () => byId("key-dialog").close());
    byId("forget-key").addEventListener("click", () => {
      api.key = "";
      byId("forget-key").hidden = true;
    });
  }

  /** The id of the chosen model; undefined until the server has told it. */
  get model() {
    return byId("models").value || this.#models[0]?.id;
  }

  /** Tokens that its context holds; undefined where the server does not say. */
  get contextLength() {
    return this.#models.find(({ id }) => id === this.model)?.max_model_len;
  }

  /** Asks for the models until the server answers, and displays meanwhile what is wrong. */
  async watch() {
    if (this.#watching) return;
    this.#watching = true;
    let waitMs = 1000;
    while (!(await this.#refreshModels())) {
      await new Promise((resolve) => setTimeout(resolve, waitMs));
      waitMs = Math.min(2 * waitMs, MAX_WAIT_MS);
    }
    this.#watching = false;
  }

  /** Displays the dialog for a key. */
  askForKey() {
    const dialog = byId("key-dialog");
    if (dialog.open) return;
    byId("key-problem").textContent = this.#api.key ? "The server did not accept this key." : "";
    byId("key").value = "";
    dialog.showModal();
  }

  /** Asks the server for its models, and displays the result; false if the caller should retry. */
  async #refreshModels() {
    const state = byId("state");
    try {
      this.#models = await this.#api.models();
    } catch (error) {
      const refused = error instanceof ApiError;
      if (refused && error.status === 401) {
        state.textContent = "A key is needed";
        this.askForKey();
        return true;
      }
      state.textContent = refused ? error.message : "The server cannot be reached";
      return false;
    }
    state.textContent = "";
    this.#show();
    return true;
  }

  #show() {
    const [name, select, chosen] = [byId("model"), byId("models"), this.model];
    select.replaceChildren(...this.#models.map(({ id }) => element("option", { value: id }, id)));
    if (this.#models.some(({ id }) => id === chosen)) select.value = chosen;
    select.hidden = this.#models.length < 2;
    name.hidden = !select.hidden;
    name.textContent = name.title = this.model ?? "hotloop";
    this.changed();
  }
}
