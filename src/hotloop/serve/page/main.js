// The page: the chat that is displayed, and what its buttons do.

import { isOpen, newAnswer, newSeed, Run } from "./answer.js";
import { Api, ApiError } from "./api.js";
import { byId, element, fitHeight, oncePerFrame } from "./dom.js";
import { count, MessageView } from "./messages.js";
import { announce, dismissToasts, toast } from "./notices.js";
import { Server } from "./server.js";
import { applyAppearance, OptionsForm } from "./settings.js";
import { showChats } from "./sidebar.js";
import { fromJson, newId, readOptions, recall, remember, Store, toJson } from "./store.js";

const EXAMPLES = [
  "Explain speculative decoding in three sentences.",
  "Write a short poem about a very fast train.",
  "What should I look for when I buy a used bicycle?",
];
const SAVE_EVERY_MS = 1000; // while an answer grows
const NARROW = matchMedia("(max-width: 820px)");

const api = new Api();
const server = new Server(api, { changed: showContext, unlocked: answerRefused });
const store = new Store(changedElsewhere);
const optionsForm = new OptionsForm(keepOptions);
const runs = new Map(); // chat id -> its Run
let chats = []; // all of them, the newest first
let chat = emptyChat(); // the one that is displayed
let loaded; // a promise: the browser's chats have been read
let views = []; // of its messages

// -------------------------------------------------------------------------------------- chats

function emptyChat() {
  const options = readOptions(JSON.parse(recall("options") ?? "{}"));
  if (!options.locked) options.seed = null;
  const now = Date.now();
  return { id: newId(), title: "New chat", created: now, updated: now, options, messages: [] };
}

async function save(changed) {
  changed.updated = Date.now();
  if (!chats.includes(changed)) chats.unshift(changed);
  chats.sort((a, b) => b.updated - a.updated);
  listChats();
  await persist(changed);
}

async function persist(changed) {
  try {
    await store.put(changed);
  } catch (error) {
    toast(`The browser could not store the chat: ${error.message}`);
  }
}

function listChats() {
  // So a reload, and the tab when it is restored, displays the same chat.
  history.replaceState(null, "", chats.includes(chat) ? `#chat=${chat.id}` : "#");
  showChats(chats, chat.id, new Set(runs.keys()), {
    open: (id) => openChat(find(id)),
    rename: (id, title) => {
      find(id).title = title;
      persist(find(id));
      listChats();
    },
    save: (id) => download([find(id)], find(id).title),
    remove: removeChat,
  });
}

const find = (id) => chats.find((candidate) => candidate.id === id);

function openChat(opened) {
  chat = opened;
  for (const message of chat.messages) {
    if (isOpen(message) && !runs.has(chat.id)) {
      message.state = message.content ? "lost" : "failed";
      message.error = message.content
        ? "The page was closed in mid-answer. What had arrived is kept."
        : "The page was closed before the answer began.";
    }
  }
  showMessages();
  optionsForm.show(chat.options);
  listChats();
  if (NARROW.matches) showSidebar(false);
}

function removeChat(id) {
  const removed = find(id);
  runs.get(id)?.stop();
  chats = chats.filter((other) => other !== removed);
  store.remove(id);
  if (chat === removed) openChat(chats[0] ?? emptyChat());
  else listChats();
  toast(`“${removed.title}” is deleted.`, "Undo", async () => {
    chats.push(removed);
    chats.sort((a, b) => b.updated - a.updated);
    await persist(removed);
    openChat(removed);
  });
}

/** Takes over what another tab has done to a chat. */
async function changedElsewhere(id) {
  if (runs.has(id)) return; // this tab writes it
  const stored = await store.get(id);
  chats = chats.filter((other) => other.id !== id);
  if (stored) chats.push(stored);
  chats.sort((a, b) => b.updated - a.updated);
  if (chat.id === id && stored) {
    chat = stored;
    showMessages();
    optionsForm.show(chat.options);
  }
  listChats();
}

function download(exported, name) {
  const blob = new Blob([toJson(exported)], { type: "application/json" });
  const link = element("a", {
    href: URL.createObjectURL(blob),
    download: `${name.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60)}.json`,
  });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

async function importFile(file) {
  let imported;
  try {
    imported = fromJson(await file.text());
  } catch (error) {
    toast(error.message);
    return;
  }
  let n = 0;
  for (const one of imported) {
    const present = find(one.id);
    if (present && toJson(present.messages) === toJson(one.messages)) continue;
    if (present) one.id = newId(); // both are kept
    chats.push(one);
    await persist(one);
    n++;
  }
  chats.sort((a, b) => b.updated - a.updated);
  listChats();
  const skipped = imported.length - n;
  toast(`Imported ${n} ${n === 1 ? "chat" : "chats"}${skipped ? `; ${skipped} were here already` : ""}.`);
}

// -------------------------------------------------------------------------------------- messages

function showMessages() {
  views = chat.messages.map(makeView);
  byId("messages").replaceChildren(...views.map((view) => view.node));
  byId("welcome").hidden = chat.messages.length > 0;
  document.title = chat.messages.length ? `${chat.title} – hotloop` : "hotloop";
  showProgress();
  toEnd();
}

function makeView(message) {
  const index = () => chat.messages.indexOf(message);
  return new MessageView(message, {
    edit: (text) => {
      if (message.role === "assistant") {
        const drafted = { ...message.drafted, content: [] };
        const unknown = { error: "", seed: null, request: "", stats: {} };
        Object.assign(message, { content: text, drafted, state: "edited", ...unknown });
        showAndSave(chat);
        return;
      }
      cut(index(), "The message and what followed are replaced.");
      add({ id: newId(), role: "user", content: text });
      answer();
    },
    remove: () => {
      const owner = chat;
      const before = [...owner.messages];
      owner.messages.splice(index(), 1);
      showAndSave(owner);
      toast("The message is deleted.", "Undo", () => {
        owner.messages = before;
        showAndSave(owner);
      });
    },
    regenerate: () => {
      cut(index(), "The answer is replaced.");
      answer(message);
    },
    continue: () => {
      cut(index() + 1);
      generate(message);
    },
    useSeed: () => {
      Object.assign(chat.options, { seed: message.seed, locked: true });
      optionsForm.show(chat.options);
      keepOptions(chat.options);
      showSettings(true);
    },
    askForKey: () => server.askForKey(),
  });
}

/** Displays a chat whose messages have changed, if it is the one on the page, and saves it. */
function showAndSave(owner) {
  if (owner === chat) showMessages();
  save(owner);
}

/** Drops the messages from an index on, and offers to undo what `notice` says. */
function cut(from, notice = "") {
  const [owner, before] = [chat, [...chat.messages]];
  const dropped = owner.messages.splice(from);
  views.splice(from).forEach((view) => view.node.remove());
  if (!notice && dropped.length < 2) return;
  toast(notice || "The messages after it are dropped.", "Undo", () => {
    runs.get(owner.id)?.stop();
    owner.messages = before;
    showAndSave(owner);
  });
}

function send(text) {
  dismissToasts(); // to undo something now would lose this message
  const last = chat.messages[chat.messages.length - 1];
  if (last?.state === "failed" && !last.content && !last.reasoning) cut(chat.messages.length - 1);
  if (!chat.messages.length) chat.title = titleOf(text);
  add({ id: newId(), role: "user", content: text });
  answer();
}

function titleOf(text) {
  const [line] = text.trim().split("\n");
  return line.length > 60 ? `${line.slice(0, 60).trimEnd()}…` : line;
}

function add(message) {
  chat.messages.push(message);
  const view = makeView(message);
  views.push(view);
  byId("messages").append(view.node);
  byId("welcome").hidden = true;
  toEnd();
  return view;
}

/** Asks again what was refused, now that there is a key. */
function answerRefused() {
  const last = chat.messages[chat.messages.length - 1];
  if (last?.state !== "failed" || last.content) return;
  cut(chat.messages.length - 1);
  answer();
}

/** Begins an answer to the last message; `before` is the one that it replaces. */
function answer(before = null) {
  const { options } = chat;
  const fresh = newAnswer();
  if (!options.locked || options.seed === null) options.seed = newSeed();
  fresh.seed = options.seed;
  add(fresh);
  optionsForm.show(chat.options);
  return generate(fresh, before);
}

async function generate(message, before = null) {
  const owner = chat;
  runs.get(owner.id)?.stop();
  const shown = () => owner === chat;
  const redraw = () => {
    const follows = isAtEnd();
    views.find((view) => view.message === message)?.update();
    showContext();
    if (follows) toEnd();
    else showToEnd();
  };
  let saving = 0; // a timer
  const draw = oncePerFrame(() => {
    if (shown()) redraw();
  });
  const run = new Run(api, owner, message, server.model, () => {
    draw();
    saving ||= setTimeout(() => {
      saving = 0;
      store.put(owner).catch(() => {}); // at its end the answer is saved again, and errors are told
    }, SAVE_EVERY_MS);
  });
  runs.set(owner.id, run);
  const finished = run.finish();
  redraw();
  showProgress();
  await save(owner);
  const error = await finished;
  clearTimeout(saving);
  if (runs.get(owner.id) === run) runs.delete(owner.id);
  compare(message, before);
  if (chats.includes(owner)) await save(owner); // it may have been deleted meanwhile
  if (shown()) {
    redraw();
    showProgress();
    announce(message.error || (message.state === "stopped" ? "Stopped." : "The answer is complete."));
  }
  if (error instanceof ApiError && error.status === 401) server.askForKey();
  else if (error) server.watch();
}

/** Notes whether an answer is the same as the one before it, if both had the same request. */
function compare(message, before) {
  const whole = (one) => one.state === "done" || one.state === "length";
  if (!before?.request || before.request !== message.request) return;
  if (!whole(before) || !whole(message)) return;
  const same = before.content === message.content && before.reasoning === message.reasoning;
  message.stats.same = Number(same);
}

function showProgress() {
  const run = runs.get(chat.id);
  byId("send").hidden = Boolean(run);
  byId("stop").hidden = !run;
  listChats();
  showContext();
}

function showContext() {
  const last = chat.messages.findLast((message) => message.stats?.context);
  const limit = server.contextLength;
  const meter = byId("context");
  meter.hidden = !last || !limit;
  if (meter.hidden) return;
  const used = last.stats.context;
  const share = Math.min(1, used / limit);
  meter.setAttribute("aria-valuemax", limit);
  meter.setAttribute("aria-valuenow", used);
  meter.title = `${count(used)} of ${count(limit)} tokens of the context are in use`;
  meter.classList.toggle("full", share > 0.9);
  byId("context-text").textContent = `${count(used)} / ${count(limit)}`;
  byId("context-fill").style.width = `${100 * share}%`;
}

// -------------------------------------------------------------------------------------- scrolling

const scroller = byId("scroller");

const isAtEnd = () => scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 60;

function toEnd() {
  scroller.scrollTop = scroller.scrollHeight;
  showToEnd();
}

function showToEnd() {
  byId("to-end").hidden = isAtEnd();
}

// -------------------------------------------------------------------------------------- the frame

/** Keeps a chat's options, and takes them over into the next chats. */
function keepOptions(options) {
  remember("options", JSON.stringify({ ...options, system: "" }));
  if (chats.includes(chat)) persist(chat);
}

function showSettings(visible) {
  byId("settings").hidden = !visible;
  byId("open-settings").setAttribute("aria-expanded", visible);
  byId("forget-key").hidden = !api.key;
  if (NARROW.matches) byId("scrim").hidden = !visible;
  if (visible) optionsForm.focus();
}

function showSidebar(visible) {
  byId("app").classList.toggle("without-sidebar", !visible);
  byId("open-sidebar").setAttribute("aria-expanded", visible);
  byId("scrim").hidden = !(visible && NARROW.matches);
}

// -------------------------------------------------------------------------------------- wiring

function listen() {
  const composer = byId("composer");
  const submit = async () => {
    const text = composer.value.trim();
    if (!text || runs.has(chat.id)) return;
    composer.value = "";
    fitHeight(composer);
    await loaded;
    send(text);
  };
  const on = (id, type, call) => byId(id).addEventListener(type, call);
  on("composer-form", "submit", (event) => {
    event.preventDefault();
    submit();
  });
  on("composer", "keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    submit();
  });
  on("composer", "input", () => fitHeight(composer));
  on("stop", "click", () => {
    runs.get(chat.id)?.stop();
    composer.focus();
  });
  on("new-chat", "click", () => {
    openChat(chat.messages.length ? emptyChat() : chat);
    composer.focus();
  });
  on("export-all", "click", () => download(chats, "hotloop-chats"));
  on("import", "click", () => byId("import-file").click());
  on("import-file", "change", async ({ target }) => {
    if (target.files.length) await importFile(target.files[0]);
    target.value = "";
  });
  on("open-sidebar", "click", () => {
    showSidebar(byId("open-sidebar").getAttribute("aria-expanded") !== "true");
  });
  on("close-sidebar", "click", () => showSidebar(false));
  on("open-settings", "click", () => showSettings(byId("settings").hidden));
  on("close-settings", "click", () => {
    showSettings(false);
    byId("open-settings").focus();
  });
  on("scrim", "click", () => {
    showSidebar(false);
    showSettings(false);
  });
  on("to-end", "click", toEnd);
  scroller.addEventListener("scroll", showToEnd, { passive: true });
  document.querySelector(".skip").addEventListener("click", (event) => {
    event.preventDefault();
    composer.focus();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || event.isComposing || byId("key-dialog").open) return;
    if (runs.has(chat.id)) runs.get(chat.id).stop();
    else if (!byId("scrim").hidden) {
      showSidebar(false);
      showSettings(false);
    }
  });
  addEventListener("pagehide", () => {
    for (const id of runs.keys()) store.put(find(id));
  });
  NARROW.addEventListener("change", () => showSidebar(!NARROW.matches));
}

function start() {
  applyAppearance();
  byId("examples").replaceChildren(
    ...EXAMPLES.map((text) => {
      const click = () => loaded.then(() => send(text));
      return element("li", {}, element("button", { type: "button", click }, text));
    }),
  );
  listen();
  showSidebar(!NARROW.matches);
  loaded = loadChats();
  server.watch();
  byId("composer").focus();
}

async function loadChats() {
  const id = location.hash.match(/^#chat=(\w+)/)?.[1];
  if (!(await store.open())) toast("This browser does not store chats here: they last until you close the tab.");
  chats = await store.all();
  openChat(find(id) ?? chat);
}

start();
