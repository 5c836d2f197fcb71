// A small Markdown: headings, lists, tables, quotations, fenced code, emphasis, code, links.
//
// It builds nodes, never HTML, so whatever a model writes is text. Every text node is a slice of
// the source: each line keeps its offset in it, and so ranges of the source (text that was drafted)
// can be marked wherever they are displayed. A line break is displayed as one, as in a poem.

import { copyButton, element } from "./dom.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^\s`]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+|$)/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?:( +)(?=\S)|[ \t]*$)/;
const TABLE_RULE = /^\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?$/;
const TARGET = /^\(\s*<?((?:[^\s()<>\\]|\\.|\([^\s()]*\))+)>?(?:\s+(?:"[^"]*"|'[^']*'))?\s*\)/;
const EMPHASIS = {
  "*": ["em"],
  _: ["em"],
  "**": ["strong"],
  __: ["strong"],
  "***": ["em", "strong"],
  ___: ["em", "strong"],
  "~~": ["del"],
};
const MAX_DEPTH = 12; // of nested blocks, and of nested inline markup
const MAX_LINK = 2048; // characters

/**
 * Displays Markdown in an element. While a text grows only blocks that changed are built again, so
 * that a selection and a button of an earlier block survive.
 *
 * @param {Element} parent
 * @param {string} source
 * @param {Array<[number, number]>} marks Ranges of the source to mark, ascending.
 * @param {boolean} grows More text will come: bold text and code at the end, not closed yet, are
 *   displayed as what they are about to be.
 */
export function renderMarkdown(parent, source, marks = [], grows = false) {
  const blocks = splitBlocks(linesOf(source), 0);
  const old = rendered.get(parent) ?? [];
  const drawn = blocks.map((block, i) => {
    const { at, end } = extent(block.lines);
    const text = source.slice(at, end);
    const before = old[i];
    const open = grows && i === blocks.length - 1;
    const same = before && before.text === text && before.at === at && before.open === open;
    if (same && before.kind === block.kind) return before;
    const node = draw(block, marks, 0, open);
    if (before) before.node.replaceWith(node);
    else parent.append(node);
    return { text, at, open, kind: block.kind, node };
  });
  for (const { node } of old.slice(blocks.length)) node.remove();
  rendered.set(parent, drawn);
}

const rendered = new WeakMap(); // element -> its blocks

// -------------------------------------------------------------------------------------- blocks

/** A line is its text and the offset of that in the source. */
function linesOf(source) {
  let at = 0;
  return source.split("\n").map((text) => {
    const line = { text, at };
    at += text.length + 1;
    return line;
  });
}

function extent(lines) {
  const last = lines[lines.length - 1];
  return { at: lines[0].at, end: last.at + last.text.length };
}

const from = (line, n) => ({ text: line.text.slice(n), at: line.at + n });
const isBlank = (line) => /^\s*$/.test(line.text);
const indent = (line) => line.text.match(/^ */)[0].length;

/** Splits lines into blocks: `{kind, lines, …}`. */
function splitBlocks(lines, depth) {
  const blocks = [];
  let i = 0;
  while (i < lines.length) {
    if (isBlank(lines[i])) {
      i++;
      continue;
    }
    const block = takeBlock(lines, i, depth);
    blocks.push(block);
    i += block.lines.length;
  }
  return blocks;
}

function takeBlock(lines, i, depth) {
  const { text } = lines[i];
  const take = (kind, end, more = {}) => ({ kind, lines: lines.slice(i, end), ...more });
  let match;
  if ((match = FENCE.exec(text))) {
    const [, fence, language] = match;
    const closing = new RegExp(`^ {0,3}${fence[0]}{${fence.length},}[ \\t]*$`);
    let end = i + 1;
    while (end < lines.length && !closing.test(lines[end].text)) end++;
    const shift = indent(lines[i]);
    const code = lines.slice(i + 1, end).map((line) => from(line, Math.min(shift, indent(line))));
    return take("code", Math.min(end + 1, lines.length), { language, code });
  }
  if (HEADING.test(text)) return take("heading", i + 1);
  if (RULE.test(text)) return take("rule", i + 1);
  if (depth < MAX_DEPTH && QUOTE.test(text)) {
    return take("quote", skip(lines, i, (line) => QUOTE.test(line.text)));
  }
  if (depth < MAX_DEPTH && ITEM.test(text)) return takeList(lines, i);
  if (text.includes("|") && i + 1 < lines.length && isTableRule(lines[i], lines[i + 1])) {
    return take("table", skip(lines, i + 2, (line) => line.text.includes("|")));
  }
  return take("paragraph", skip(lines, i + 1, (line) => !isBlank(line) && !interrupts(line, depth)));
}

function skip(lines, i, holds) {
  while (i < lines.length && holds(lines[i])) i++;
  return i;
}

function interrupts({ text }, depth) {
  return (
    FENCE.test(text) ||
    HEADING.test(text) ||
    RULE.test(text) ||
    // As in CommonMark, "1986. A great year" in mid-paragraph begins no list.
    (depth < MAX_DEPTH && (QUOTE.test(text) || /^ *(?:[-*+]|1[.)]) +\S/.test(text)))
  );
}

function isTableRule(head, rule) {
  return TABLE_RULE.test(rule.text.trim()) && cells(head).length === cells(rule).length;
}

/** Takes a list: its items, with their lines freed of the indentation. */
function takeList(lines, start) {
  const ordered = isOrdered(lines[start]);
  const items = [];
  let i = start;
  while (i < lines.length) {
    const match = ITEM.exec(lines[i].text);
    if (!match || isOrdered(lines[i]) !== ordered || RULE.test(lines[i].text)) break;
    const [whole, before, marker] = match;
    // After five spaces the text is further in, as code is elsewhere: one of them separates.
    const spaces = match[3] && match[3].length <= 4 ? match[3].length : 1;
    const width = before.length + marker.length + spaces;
    const item = [from(lines[i], Math.min(width, whole.length))];
    // Models indent nested lists by two, three or four, whatever the marker's width.
    const within = before.length + 2;
    i++;
    while (i < lines.length) {
      const line = lines[i];
      if (isBlank(line)) {
        const next = skip(lines, i, isBlank);
        if (next === lines.length || indent(lines[next]) < within) break;
        for (; i < next; i++) item.push(from(lines[i], lines[i].text.length));
      } else if (indent(line) >= within) {
        item.push(from(line, Math.min(indent(line), width)));
        i++;
      } else if (!interrupts(line, 0) && !ITEM.test(line.text) && !isBlank(lines[i - 1])) {
        item.push(line); // a paragraph's further line, not indented
        i++;
      } else break;
    }
    items.push({ marker, lines: item });
    const next = skip(lines, i, isBlank);
    if (next < lines.length && ITEM.test(lines[next].text) && isOrdered(lines[next]) === ordered) {
      i = next;
    }
  }
  return { kind: ordered ? "ordered" : "bullets", lines: lines.slice(start, i), items };
}

const isOrdered = (line) => /^ *\d/.test(line.text);

/** Draws a block; `open` if its text may go on. */
function draw(block, marks, depth, open) {
  const inline = (node, lines, last = true) => new Inline(lines, marks, open && last).into(node);
  const nested = (node, lines, last = true) => {
    const children = splitBlocks(lines, depth + 1);
    children.forEach((child, i) => {
      const isLast = last && i === children.length - 1;
      node.append(draw(child, marks, depth + 1, open && isLast));
    });
    return node;
  };
  switch (block.kind) {
    case "code":
      return drawCode(block, marks);
    case "heading": {
      const [line] = block.lines;
      const [marker, hashes] = HEADING.exec(line.text);
      const text = from(line, marker.length);
      text.text = text.text.trimEnd().replace(/[ \t]#+$/, "");
      // The page has the headings 1 and 2.
      return inline(element(`h${Math.min(6, hashes.length + 2)}`), [text]);
    }
    case "rule":
      return element("hr");
    case "quote": {
      const inside = block.lines.map((line) => from(line, QUOTE.exec(line.text)[0].length));
      return nested(element("blockquote"), inside);
    }
    case "ordered":
    case "bullets":
      return drawList(block, nested, inline);
    case "table":
      return drawTable(block, inline);
    default:
      return inline(element("p"), block.lines.map((line) => from(line, indent(line))));
  }
}

function drawCode({ language, code }, marks) {
  const text = code.map((line) => line.text).join("\n");
  const shown = element("code");
  code.forEach((line, i) => {
    if (i) shown.append("\n");
    appendMarked(shown, line.text, line.at, marks);
  });
  return element(
    "div",
    { class: "code" },
    element(
      "div",
      { class: "code-head" },
      element("span", {}, language || "code"),
      copyButton("Copy the code", () => text),
    ),
    element("pre", { tabindex: "0" }, shown),
  );
}

function drawList({ kind, items }, nested, inline) {
  const first = parseInt(items[0].marker, 10);
  const ordered = kind === "ordered";
  const list = element(ordered ? "ol" : "ul", ordered && first !== 1 ? { start: first } : {});
  items.forEach(({ lines }, i) => {
    const last = i === items.length - 1;
    const item = element("li");
    const task = /^\[([ xX])\] /.exec(lines[0].text);
    if (task) {
      const box = element("input", { type: "checkbox", disabled: true, checked: task[1] !== " " });
      box.setAttribute("aria-label", task[1] === " " ? "open" : "done");
      item.className = "task";
      item.append(box);
      lines[0] = from(lines[0], task[0].length);
    }
    if (lines.length === 1) inline(item, lines, last);
    else nested(item, lines, last);
    list.append(item);
  });
  return list;
}

function drawTable({ lines: [head, rule, ...rows] }, inline) {
  const align = cells(rule).map(({ text }) => {
    const side = (text.startsWith(":") ? 1 : 0) + (text.endsWith(":") ? 2 : 0);
    return ["", "", "right", "center"][side];
  });
  const row = (line, tag) => {
    const node = element("tr");
    const found = cells(line);
    align.forEach((side, i) => {
      const cell = element(tag, side ? { class: side } : {});
      if (tag === "th") cell.scope = "col";
      node.append(found[i] ? inline(cell, [found[i]], false) : cell);
    });
    return node;
  };
  return element(
    "div",
    { class: "table", tabindex: "0", role: "region", "aria-label": "Table" },
    element(
      "table",
      {},
      element("thead", {}, row(head, "th")),
      element("tbody", {}, ...rows.map((line) => row(line, "td"))),
    ),
  );
}

/** Splits a table's row at each "|" that is neither escaped nor in code. */
function cells(line) {
  const found = [];
  let start = 0;
  let inCode = false;
  const { text } = line;
  for (let i = 0; i <= text.length; i++) {
    if (text[i] === "\\") i++;
    else if (text[i] === "`") inCode = !inCode;
    else if (i === text.length || (text[i] === "|" && !inCode)) {
      const cell = from({ text: text.slice(0, i), at: line.at }, start);
      const shift = cell.text.match(/^\s*/)[0].length;
      found.push({ text: cell.text.trim(), at: cell.at + shift });
      start = i + 1;
    }
  }
  if (found.length && found[0].text === "") found.shift();
  if (found.length && found[found.length - 1].text === "") found.pop();
  return found;
}

// -------------------------------------------------------------------------------------- inline

/** Draws the inline content of lines. */
class Inline {
  constructor(lines, marks, open) {
    this.lines = lines;
    this.marks = marks;
    this.open = open;
    this.inLink = false;
    this.text = lines.map((line) => line.text).join("\n");
    this.starts = []; // of each line in the text
    let start = 0;
    for (const line of lines) {
      this.starts.push(start);
      start += line.text.length + 1;
    }
  }

  into(parent) {
    this.#scan(parent, 0, this.text.length, 0);
    return parent;
  }

  /** Appends the characters `[start, end)`, and draws their markup. */
  #scan(parent, start, end, depth) {
    const unclosed = new Set(); // delimiters that were sought once in vain: no quadratic time
    let plain = start; // where the text begins that is not yet appended
    let i = start;
    while (i < end) {
      const found = this.#markup(i, end, depth, unclosed);
      if (typeof found === "number") {
        i += found;
        continue;
      }
      this.#append(parent, plain, i);
      parent.append(found.node);
      i = plain = found.end;
    }
    this.#append(parent, plain, end);
  }

  /** Returns the markup that begins at `i`, `{node, end}`, or how many characters are text. */
  #markup(i, end, depth, unclosed) {
    const { text } = this;
    switch (text[i]) {
      case "\n":
        return { node: element("br"), end: i + 1 };
      case "\\": {
        if (i + 1 === end || !/[!-/:-@[-`{-~]/.test(text[i + 1])) return 1;
        const node = document.createDocumentFragment();
        this.#append(node, i + 1, i + 2);
        return { node, end: i + 2 };
      }
      case "`":
        return this.#code(i, end, unclosed);
      case "*":
      case "_":
      case "~":
        return depth < MAX_DEPTH ? this.#emphasis(i, end, depth, unclosed) : 1;
      case "!":
      case "[":
        return depth < MAX_DEPTH && !this.inLink ? this.#link(i, end, depth) : 1;
      case "h":
        return this.inLink ? 1 : this.#address(i, end);
      default:
        return 1;
    }
  }

  #code(i, end, unclosed) {
    const { text } = this;
    const n = this.#run(i, end);
    const run = "`".repeat(n);
    if (unclosed.has(run)) return n;
    let close = i + n;
    for (;;) {
      close = text.indexOf(run, close);
      if (close < 0 || close + n > end) {
        if (n === 1 && this.#mayClose(i + n, end)) {
          close = end;
          break;
        }
        unclosed.add(run);
        return n;
      }
      const length = this.#run(close, end);
      if (length === n) break;
      close += length;
    }
    let [a, b] = [i + n, close];
    const inside = text.slice(a, b);
    if (/^\s.*\s$/s.test(inside) && inside.trim()) [a, b] = [a + 1, b - 1];
    const node = element("code");
    this.#append(node, a, b);
    return { node, end: Math.min(end, close + n) };
  }

  /** Whether markup whose text begins at `i` may be closed by text that is still to come. */
  #mayClose(i, end) {
    return this.open && end === this.text.length && i < end;
  }

  /** Returns how often the character at `i` is repeated. */
  #run(i, end) {
    let after = i + 1;
    while (after < end && this.text[after] === this.text[i]) after++;
    return after - i;
  }

  #emphasis(i, end, depth, unclosed) {
    const { text } = this;
    const c = text[i];
    const n = this.#run(i, end);
    const inWord = (at) => at >= 0 && at < text.length && /[\p{L}\p{N}]/u.test(text[at]);
    const isSpace = (at) => at < 0 || at >= text.length || /\s/.test(text[at]);
    const delimiter = c.repeat(n);
    const tags = EMPHASIS[delimiter];
    if (!tags || isSpace(i + n) || (c === "_" && inWord(i - 1)) || unclosed.has(delimiter)) return n;
    let close = i + n;
    for (;;) {
      close = text.indexOf(delimiter, close);
      if (close < 0 || close + n > end) {
        if (delimiter === "**" && !inWord(i - 1) && this.#mayClose(i + n, end)) {
          const node = element("strong");
          this.#scan(node, i + n, end, depth + 1);
          return { node, end };
        }
        unclosed.add(delimiter);
        return n;
      }
      const length = this.#run(close, end);
      const after = close + length;
      // The end of a longer run, as in **bold *and italic***, closes this one.
      const fits = length === n || (length === 3 && n < 3);
      close = after;
      if (fits && !isSpace(after - length - 1) && !(c === "_" && inWord(after))) break;
    }
    const nodes = tags.map((tag) => element(tag));
    if (nodes[1]) nodes[0].append(nodes[1]);
    this.#scan(nodes[nodes.length - 1], i + n, close - n, depth + 1);
    return { node: nodes[0], end: close };
  }

  /** A link, or an image, which is displayed as a link: nothing is loaded from elsewhere. */
  #link(i, end, depth) {
    const { text } = this;
    const open = text[i] === "!" ? i + 1 : i;
    const last = Math.min(end, open + MAX_LINK);
    if (text[open] !== "[" || open >= end) return 1;
    let nesting = 0;
    let close = open;
    for (; close < last; close++) {
      if (text[close] === "\\") close++;
      else if (text[close] === "[") nesting++;
      else if (text[close] === "]" && --nesting === 0) break;
    }
    if (close >= last) return 1;
    const target = TARGET.exec(text.slice(close + 1, Math.min(end, close + MAX_LINK)));
    const url = target && webAddress(target[1]);
    if (!url) return 1;
    const node = link(url);
    this.inLink = true; // links are not nested
    this.#scan(node, open + 1, close, depth + 1);
    this.inLink = false;
    if (!node.textContent) node.textContent = url;
    return { node, end: close + 1 + target[0].length };
  }

  #address(i, end) {
    const { text } = this;
    if (i > 0 && /[\p{L}\p{N}]/u.test(text[i - 1])) return 1;
    const match = /^https?:\/\/[^\s<>"`*|]+/.exec(text.slice(i, Math.min(end, i + MAX_LINK)));
    if (!match) return 1;
    let [address] = match;
    // Punctuation at the end belongs to the sentence, unless it is a bracket opened in the address.
    while (/[.,;:!?'_~]$/.test(address) || (/[)\]]$/.test(address) && !balanced(address))) {
      address = address.slice(0, -1);
    }
    const url = webAddress(address);
    if (!url) return 1;
    const node = link(url);
    this.#append(node, i, i + address.length);
    return { node, end: i + address.length };
  }

  /** Appends the characters `[start, end)` as text; they cross lines only in code. */
  #append(parent, start, end) {
    let line = 0;
    for (let high = this.starts.length; high - line > 1; ) {
      const middle = (line + high) >> 1;
      if (this.starts[middle] <= start) line = middle;
      else high = middle;
    }
    for (let a = start; a < end; line++) {
      const first = this.starts[line];
      const b = Math.min(end, first + this.lines[line].text.length);
      appendMarked(parent, this.text.slice(a, b), this.lines[line].at + a - first, this.marks);
      if (b < end) parent.append(" ");
      a = b + 1;
    }
  }
}

function balanced(text) {
  const count = (c) => text.split(c).length;
  return count("(") === count(")") && count("[") === count("]");
}

/** Returns an address if it is one of the web; null for `javascript:` and everything else. */
function webAddress(text) {
  if (!/^https?:\/\//i.test(text)) return null;
  try {
    return new URL(text).href;
  } catch {
    return null;
  }
}

function link(url) {
  return element("a", { href: url, title: url, target: "_blank", rel: "noopener noreferrer nofollow" });
}

/** Appends text that is at an offset of the source, and marks what is in one of the ranges. */
function appendMarked(parent, text, at, marks) {
  const end = at + text.length;
  let low = 0;
  for (let high = marks.length; low < high; ) {
    const middle = (low + high) >> 1;
    if (marks[middle][1] <= at) low = middle + 1;
    else high = middle;
  }
  let done = at;
  for (; low < marks.length && marks[low][0] < end; low++) {
    const [a, b] = [Math.max(marks[low][0], at), Math.min(marks[low][1], end)];
    if (a > done) parent.append(text.slice(done - at, a - at));
    parent.append(element("span", { class: "drafted" }, text.slice(a - at, b - at)));
    done = b;
  }
  if (done < end) parent.append(text.slice(done - at));
}
