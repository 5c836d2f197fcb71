// The server, spoken to in OpenAI's API with a few of hotloop's own fields.

import { readEvents } from "./sse.js";

/** The server refused, or reported an error while it streamed. */
export class ApiError extends Error {
  constructor(message, { status = 0, code = null, retryAfterS = null } = {}) {
    super(message);
    Object.assign(this, { status, code, retryAfterS });
  }
}

/** Nothing answered at the server's address. */
export class Unreachable extends Error {}

/** An answer's stream ended before it was complete. */
export class ConnectionLost extends Error {}

const KEY = "hotloop-key";

export class Api {
  #key = "";

  constructor() {
    try {
      this.#key = sessionStorage.getItem(KEY) ?? "";
    } catch {
      // The browser forbids to store anything: the key lasts as long as this page.
    }
  }

  get key() {
    return this.#key;
  }

  set key(value) {
    this.#key = value;
    try {
      sessionStorage.setItem(KEY, value);
    } catch {
      // As above.
    }
  }

  /** Returns the served models: `[{id, max_model_len, …}]`. */
  async models() {
    const response = await this.#fetch("v1/models", {});
    return (await response.json()).data;
  }

  /**
   * Streams the chunks of an answer to `body`, a request of `/v1/chat/completions`.
   *
   * @throws {ApiError|Unreachable|ConnectionLost} An abort by `signal` is thrown as it is.
   */
  async *chat(body, signal) {
    const response = await this.#fetch("v1/chat/completions", {
      method: "POST",
      body: JSON.stringify(body),
      signal,
    });
    try {
      for await (const data of readEvents(response.body)) {
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new ApiError(chunk.error.message, { code: chunk.error.code });
        yield chunk;
      }
    } catch (error) {
      if (error instanceof ApiError || signal.aborted) throw error;
      throw new ConnectionLost(error.message);
    }
    throw new ConnectionLost("the stream ended early");
  }

  async #fetch(path, options) {
    const headers = { "Content-Type": "application/json" };
    if (this.#key) headers.Authorization = `Bearer ${this.#key}`;
    let response;
    try {
      response = await fetch(new URL(path, document.baseURI), {
        ...options,
        headers,
        cache: "no-store",
        credentials: "same-origin",
      });
    } catch (error) {
      if (options.signal?.aborted) throw error;
      throw new Unreachable(error.message);
    }
    if (!response.ok) throw await refusal(response);
    return response;
  }
}

async function refusal(response) {
  const { status } = response;
  const text = await response.text().catch(() => "");
  let error = {};
  try {
    error = JSON.parse(text).error ?? {};
  } catch {
    // A proxy's own page: the status says enough.
  }
  const retryAfterS = Number(response.headers.get("Retry-After")) || null;
  const message = error.message ?? `The server answered with status ${status}.`;
  return new ApiError(message, { status, code: error.code, retryAfterS });
}
