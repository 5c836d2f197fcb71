// Chats in this browser's IndexedDB, and their export and import as JSON.
//
// A chat is {id, title, created, updated, options, messages}, times in milliseconds. A message is
// {id, role, content}; an answer also has what is known of it, see answer.js.

const FORMAT = "hotloop-chats";
const VERSION = 1;
const ENDS = ["done", "length", "stopped", "edited", "lost", "failed"]; // of answers

export class Store {
  #database = null; // a promise of it; null where the browser offers none, as in some private modes
  #memory = new Map();
  #channel = new BroadcastChannel("hotloop-chats");

  /** @param {(id: string) => void} changed Is told of chats that another tab has changed. */
  constructor(changed) {
    this.#channel.onmessage = ({ data }) => changed(data);
  }

  /** Opens the database; false if chats last only as long as this page. */
  async open() {
    try {
      const request = indexedDB.open("hotloop", 1);
      request.onupgradeneeded = () => request.result.createObjectStore("chats", { keyPath: "id" });
      this.#database = await settled(request);
      return true;
    } catch {
      return false;
    }
  }

  /** Returns all chats, the newest first. */
  async all() {
    const chats = this.#database
      ? await settled(this.#chats("readonly").getAll())
      : [...this.#memory.values()];
    return chats.sort((a, b) => b.updated - a.updated);
  }

  async get(id) {
    if (!this.#database) return this.#memory.get(id);
    return settled(this.#chats("readonly").get(id));
  }

  async put(chat) {
    if (this.#database) {
      const chats = this.#chats("readwrite");
      const request = chats.put(chat);
      chats.transaction.commit(); // at once: a page that is being closed hears of no result
      await settled(request);
    } else this.#memory.set(chat.id, chat);
    this.#channel.postMessage(chat.id);
  }

  async remove(id) {
    if (this.#database) await settled(this.#chats("readwrite").delete(id));
    else this.#memory.delete(id);
    this.#channel.postMessage(id);
  }

  #chats(mode) {
    return this.#database.transaction("chats", mode).objectStore("chats");
  }
}

function settled(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

const kept = new Map(); // what could not be stored lasts as long as this page

/** Stores a preference in this browser. */
export function remember(name, value) {
  try {
    localStorage.setItem(`hotloop-${name}`, value);
  } catch {
    kept.set(name, value); // the browser may forbid it
  }
}

/** Returns a stored preference; null if there is none. */
export function recall(name) {
  try {
    return localStorage.getItem(`hotloop-${name}`);
  } catch {
    return kept.get(name) ?? null;
  }
}

export function newId() {
  // `crypto.randomUUID` exists on https and loopback only.
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

export function toJson(chats) {
  return JSON.stringify({ format: FORMAT, version: VERSION, chats }, null, 1);
}

/**
 * Reads exported chats.
 *
 * @param {string} text
 * @returns {object[]} The chats, of which only known fields are kept.
 * @throws {Error} What is wrong with the file, for the user.
 */
export function fromJson(text) {
  let data;
  try {
    data = JSON.parse(text);
  } catch {
    throw new Error("The file is not JSON.");
  }
  if (data?.format !== FORMAT || !Array.isArray(data.chats)) {
    throw new Error("The file is not an export of chats of this page.");
  }
  if (data.version !== VERSION) {
    throw new Error(`The file has version ${data.version}; this page reads version ${VERSION}.`);
  }
  return data.chats.map((chat, i) => {
    if (!Array.isArray(chat?.messages)) throw new Error(`Chat ${i + 1} of the file has no messages.`);
    return {
      id: text_(chat.id) || newId(),
      title: text_(chat.title) || "Imported chat",
      created: number(chat.created) ?? Date.now(),
      updated: number(chat.updated) ?? Date.now(),
      options: readOptions(chat.options),
      messages: chat.messages.map((message, j) => readMessage(message, i, j)),
    };
  });
}

function readMessage(message, i, j) {
  if (!["user", "assistant"].includes(message?.role) || typeof message.content !== "string") {
    throw new Error(`Message ${j + 1} of chat ${i + 1} of the file has no role and text.`);
  }
  const read = { id: text_(message.id) || newId(), role: message.role, content: message.content };
  if (message.role === "user") return read;
  const state = ENDS.includes(message.state) ? message.state : "done";
  const stats = {};
  for (const [name, value] of Object.entries(message.stats ?? {})) {
    if (number(value) !== null) stats[name] = value;
  }
  return {
    ...read,
    reasoning: text_(message.reasoning),
    drafted: { content: ranges(message.drafted?.content), reasoning: ranges(message.drafted?.reasoning) },
    state,
    error: text_(message.error),
    seed: number(message.seed),
    request: text_(message.request),
    stats,
  };
}

export function readOptions(options) {
  return {
    system: text_(options?.system),
    temperature: number(options?.temperature),
    top_p: number(options?.top_p),
    max_tokens: number(options?.max_tokens),
    seed: number(options?.seed),
    locked: options?.locked === true,
  };
}

function ranges(value) {
  if (!Array.isArray(value)) return [];
  return value.filter((range) => Array.isArray(range) && range.every(Number.isInteger));
}

const text_ = (value) => (typeof value === "string" ? value : "");
const number = (value) => (Number.isFinite(value) ? value : null);
