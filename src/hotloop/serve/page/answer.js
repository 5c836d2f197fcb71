// An answer while it is generated: the request, its chunks, and its speed and drafts.
//
// An answer is a message with
//   reasoning  text that the model thought before its answer
//   drafted    {content, reasoning}: ranges of these texts that were accepted drafts
//   state      "waiting", "streaming", or how it ended: "done", "length" (at the limit), "stopped"
//              or "edited" (by the user), "lost" (the connection), "failed" (an error)
//   error      what went wrong, for the user
//   seed       of its sampling
//   request    its options, as JSON, to tell whether two answers had the same request
//   stats      {ttft_s, decode_tok_s, prompt_tokens, cached_tokens, context} of its last request,
//              {tokens, accepted, thought_s} of all of it, and whether it is the {same} as before

import { ApiError, Unreachable } from "./api.js";
import { newId } from "./store.js";

export function newAnswer() {
  return {
    id: newId(),
    role: "assistant",
    content: "",
    reasoning: "",
    drafted: { content: [], reasoning: [] },
    state: "waiting",
    error: "",
    seed: null,
    request: "",
    stats: {},
  };
}

export const isOpen = (message) => message.state === "waiting" || message.state === "streaming";

/** Draws a seed that is easy to read and to type. */
export const newSeed = () => crypto.getRandomValues(new Uint32Array(1))[0] % 1_000_000;

const MIN_RATE_MS = 50; // chunks that arrive together say nothing of speed

/** The generation of one answer. */
export class Run {
  #abort = new AbortController();
  #first = null; // {now, tokens} at the first chunk with text
  #tokens = 0; // of this request
  #before = { tokens: 0, accepted: 0 }; // of the text that is continued

  /**
   * @param {Api} api
   * @param {object} chat
   * @param {object} answer The last message of the chat; its text is continued.
   * @param {string} model
   * @param {() => void} changed Is called whenever the answer has changed.
   */
  constructor(api, chat, answer, model, changed) {
    Object.assign(this, { api, chat, answer, model, changed });
  }

  /** Ends the answer here; the server notices that nobody listens. */
  stop() {
    this.#abort.abort();
  }

  /**
   * Generates until the answer ends, in whatever way.
   *
   * @returns {Promise<?Error>} What refused or ended it too early.
   */
  async finish() {
    const { answer } = this;
    const continues = answer.content !== "";
    const { tokens = 0, accepted = 0, thought_s } = continues ? answer.stats : {};
    this.#before = { tokens, accepted };
    const stats = thought_s === undefined ? {} : { thought_s };
    Object.assign(answer, { state: "waiting", error: "", stats });
    const sent = performance.now();
    try {
      for await (const chunk of this.api.chat(this.#body(continues), this.#abort.signal)) {
        this.#take(chunk, sent);
        this.changed();
      }
      if (isOpen(answer)) answer.state = "done";
      return null;
    } catch (error) {
      if (this.#abort.signal.aborted) {
        answer.state = "stopped";
        return null;
      }
      const received = answer.content !== "" || answer.reasoning !== "";
      answer.state = received && !(error instanceof ApiError) ? "lost" : "failed";
      answer.error = explain(error, received);
      return error;
    } finally {
      this.changed();
    }
  }

  #body(continues) {
    const { answer, chat } = this;
    const { system, temperature, top_p, max_tokens } = chat.options;
    const options = { temperature, top_p, max_tokens, seed: answer.seed };
    for (const name of Object.keys(options)) if (options[name] === null) delete options[name];
    answer.request = JSON.stringify({ ...options, system, model: this.model });
    const before = chat.messages.slice(0, chat.messages.indexOf(answer));
    const messages = [];
    if (system) messages.push({ role: "system", content: system });
    for (const { role, content } of continues ? [...before, answer] : before) {
      if (content) messages.push({ role, content });
    }
    return {
      model: this.model,
      messages,
      ...options,
      ...(continues && { continue_final_message: true, add_generation_prompt: false }),
      stream: true,
      stream_options: { include_usage: true, continuous_usage_stats: true },
      hotloop: { details: true },
    };
  }

  #take(chunk, sent) {
    const { answer } = this;
    const now = performance.now();
    const [choice] = chunk.choices;
    const accepted = chunk.hotloop?.accepted; // tokens; with it, the text was drafted
    const { content, reasoning_content: reasoning } = choice?.delta ?? {};
    for (const [name, text] of Object.entries({ reasoning, content })) {
      if (!text) continue;
      if (accepted !== undefined) extend(answer.drafted[name], answer[name].length, text.length);
      answer[name] += text;
      answer.state = "streaming";
    }
    this.#count(chunk, accepted, now, sent, Boolean(content || reasoning));
    if (reasoning && !answer.content) answer.stats.thought_s = (now - this.#first.now) / 1000;
    if (choice?.finish_reason) answer.state = choice.finish_reason === "length" ? "length" : "done";
  }

  #count({ usage }, accepted, now, sent, hasText) {
    const { stats } = this.answer;
    // A server that does not count as it goes: nearly every chunk is one token.
    this.#tokens = usage?.completion_tokens ?? this.#tokens + hasText;
    stats.tokens = this.#before.tokens + this.#tokens;
    if (usage) {
      stats.context = usage.prompt_tokens + this.#tokens;
      stats.prompt_tokens = usage.prompt_tokens;
      stats.cached_tokens = usage.prompt_tokens_details?.cached_tokens ?? stats.cached_tokens;
    }
    stats.accepted = (stats.accepted ?? this.#before.accepted) + (accepted ?? 0);
    if (!hasText) return;
    if (!this.#first) {
      this.#first = { now, tokens: this.#tokens };
      stats.ttft_s = (now - sent) / 1000;
    } else if (now - this.#first.now > MIN_RATE_MS) {
      const seconds = (now - this.#first.now) / 1000;
      stats.decode_tok_s = (this.#tokens - this.#first.tokens) / seconds;
    }
  }
}

/** Adds a range to ascending ones; joins it to the last where they touch. */
function extend(ranges, start, length) {
  const last = ranges[ranges.length - 1];
  if (last?.[1] === start) last[1] += length;
  else ranges.push([start, start + length]);
}

/** Returns why an answer ended too early, in words for the user. */
function explain(error, received) {
  const kept = received ? " What had arrived is kept." : "";
  if (error instanceof Unreachable) return "The server cannot be reached. Is it running?";
  if (!(error instanceof ApiError)) return `The connection was lost in mid-answer.${kept}`;
  if (error.status === 401) return "The server needs an API key.";
  if (error.status === 429) {
    const when = error.retryAfterS ? ` in ${error.retryAfterS} s` : " in a moment";
    return `The server is busy: too many requests wait. Try again${when}.`;
  }
  return error.message + kept;
}
