// Server-sent events over fetch. `EventSource` can neither POST nor send a key.

/** Splits text into the data of events, however the network cut it. */
export class EventParser {
  #pending = "";
  #data = [];

  /**
   * @param {string} text The next piece of the stream.
   * @returns {string[]} The data of the events that it completed.
   */
  push(text) {
    const events = [];
    // A carriage return at the end may be the first half of a CRLF.
    const lines = (this.#pending + text).split(/\r\n|\n|\r(?!$)/);
    this.#pending = lines.pop();
    for (const line of lines) {
      if (line === "") {
        if (this.#data.length) events.push(this.#data.join("\n"));
        this.#data = [];
      } else if (line === "data" || line.startsWith("data:")) {
        this.#data.push(line.slice(5).replace(/^ /, ""));
      } // Lines that begin with ":" are comments; other fields have no meaning here.
    }
    return events;
  }
}

/**
 * Reads the data of the events of a response, until it ends.
 *
 * @param {ReadableStream<Uint8Array>} stream
 */
export async function* readEvents(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  const parser = new EventParser();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield* parser.push(decoder.decode(value, { stream: true }));
    }
  } finally {
    reader.cancel().catch(() => {}); // frees the connection where the caller stops early
  }
}
