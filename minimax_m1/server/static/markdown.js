// Markdown to DOM nodes, while it streams in. Whatever the text says, it becomes text nodes inside elements that are
// made here: there is no way from the source to markup, and links go to http, https and mailto only.
//
// Headings, paragraphs, lists, quotes, fenced code, tables, rules; code, strong, emphasis, strike, links. Line breaks
// are kept (the style sheet has pre-wrap), as models mean them. Every function is linear in the length of its text.

import { el, icon } from "./dom.js";

const MOST_NESTING = 12; // lists and quotes in each other; deeper ones stay text
const MOST_INLINE_NESTING = 40;

/** Renders a growing text into a container. Blocks that can no longer change are never touched again. */
export class MarkdownStream {
  constructor(container) {
    this.container = container;
    this.source = ""; // of the blocks that may still change
    this.live = []; // their nodes
  }

  push(text) {
    this.source += text;
    this.#render(false);
  }

  finish() {
    this.#render(true);
  }

  #render(isLast) {
    const lines = this.source.split("\n");
    const blocks = parseBlocks(lines, 0);
    // A block is settled when the next one has surely begun: half a line may still become its continuation.
    const isSure = ({ type, start }) => start + (type === "table" ? 2 : 1) < lines.length;
    let settled = isLast ? blocks.length : 0;
    if (!isLast) while (settled + 1 < blocks.length && isSure(blocks[settled + 1])) settled++;
    const reused = this.#extendCode(blocks, settled, isLast);
    if (!reused) {
      for (const node of this.live) node.remove();
      filled(
        this.container,
        blocks.slice(0, settled).map((block) => renderBlock(block, false)),
      );
      this.live = blocks.slice(settled).map((block) => renderBlock(block, true));
      filled(this.container, this.live);
    }
    if (settled > 0) this.source = settled < blocks.length ? lines.slice(blocks[settled].start).join("\n") : "";
  }

  /** Add to the text of a code block that is still open, instead of making it anew. */
  #extendCode(blocks, settled, isLast) {
    if (isLast || settled > 0 || blocks.length !== 1 || blocks[0].type !== "code" || this.live.length !== 1)
      return false;
    const shown = this.live[0].querySelector("code")?.firstChild;
    if (!shown || this.live[0].dataset.language !== blocks[0].language) return false;
    const { text } = blocks[0];
    if (!text.startsWith(shown.data)) return false;
    shown.appendData(text.slice(shown.data.length));
    return true;
  }
}

/** Render a whole text. */
export function renderMarkdown(text, container) {
  const stream = new MarkdownStream(container);
  stream.source = text;
  stream.finish();
}

/** A block of code with a button that copies it. */
export function codeBlock(text, language) {
  const copy = el("button", { type: "button", class: "quiet", data: { action: "copy-code" } }, icon("copy"), "Copy");
  const bar = el("div", { class: "code-bar" }, el("span", {}, language || "text"), copy);
  const code = el("pre", { tabindex: "0", "aria-label": "Code" }, el("code", {}, document.createTextNode(text)));
  return el("div", { class: "code", data: { language } }, bar, code);
}

// ---- blocks --------------------------------------------------------------------------------------------------------

const FENCE = /^( {0,3})(`{3,}|~{3,})[ \t]*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*))?$/;
const RULE = /^ {0,3}(?:(?:-[ \t]*){3,}|(?:\*[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|(\d{1,9})[.)])( +|$)/;
const TABLE_RULE = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;
const BLANK = /^[ \t]*$/;

/** Return the blocks of lines: {type, start, …}, where start is the first line. */
function parseBlocks(lines, depth) {
  const blocks = [];
  let i = 0;
  while (i < lines.length) {
    if (BLANK.test(lines[i])) {
      i++;
      continue;
    }
    const start = i;
    const kind = depth < MOST_NESTING ? startOf(lines, i) : "paragraph";
    const [block, end] = READERS[kind](lines, i, depth);
    blocks.push({ ...block, start });
    i = end;
  }
  return blocks;
}

/** Say what begins at a line. */
function startOf(lines, i) {
  const line = lines[i];
  if (FENCE.test(line)) return "code";
  if (HEADING.test(line)) return "heading";
  if (RULE.test(line)) return "rule";
  if (QUOTE.test(line)) return "quote";
  if (/^ {0,3}\S/.test(line) && ITEM.test(line)) return "list";
  if (isTable(lines, i)) return "table";
  return "paragraph";
}

const isTable = (lines, i) =>
  lines[i].includes("|") &&
  i + 1 < lines.length &&
  lines[i + 1].includes("|") &&
  TABLE_RULE.test(lines[i + 1]) &&
  cellsOf(lines[i]).length === cellsOf(lines[i + 1]).length;

/** Whether a line ends the paragraph before it. A number does so only if the list starts with 1, as in CommonMark. */
function interrupts(lines, i) {
  if (BLANK.test(lines[i])) return true;
  const kind = startOf(lines, i);
  if (kind !== "list") return kind !== "paragraph";
  const [, , , number, space] = ITEM.exec(lines[i]);
  return space !== "" && (number === undefined || Number(number) === 1);
}

const READERS = {
  code(lines, i) {
    const [, indent, fence, info] = FENCE.exec(lines[i]);
    const close = new RegExp(`^ {0,3}\\${fence[0]}{${fence.length},}[ \\t]*$`);
    const body = [];
    let end = i + 1;
    while (end < lines.length && !close.test(lines[end])) body.push(lines[end++]);
    const isOpen = end === lines.length;
    if (isOpen && body.length && /^ {0,3}[`~]{1,}$/.test(body.at(-1))) body.pop(); // its closing fence is on the way
    const text = body.map((line) => (indent && line.startsWith(indent) ? line.slice(indent.length) : line)).join("\n");
    return [{ type: "code", text, language: info.trim().split(/\s/)[0].slice(0, 30) }, isOpen ? end : end + 1];
  },

  heading(lines, i) {
    const [, marks, text = ""] = HEADING.exec(lines[i]);
    return [
      {
        type: "heading",
        level: marks.length,
        text: text
          .trim()
          .replace(/(^|[ \t])#+$/, "")
          .trim(),
      },
      i + 1,
    ];
  },

  rule: (lines, i) => [{ type: "rule" }, i + 1],

  quote(lines, i, depth) {
    let end = i;
    const inner = [];
    while (end < lines.length && QUOTE.test(lines[end])) inner.push(lines[end++].replace(QUOTE, ""));
    return [{ type: "quote", blocks: parseBlocks(inner, depth + 1) }, end];
  },

  list(lines, i, depth) {
    const [, , marker, number] = ITEM.exec(lines[i]);
    const family = number === undefined ? marker : marker.at(-1);
    const items = [];
    let isLoose = false;
    let end = i;
    while (end < lines.length) {
      const item = ITEM.exec(lines[end]);
      if (!item || RULE.test(lines[end]) || (item[3] === undefined ? item[2] : item[2].at(-1)) !== family) break;
      const [inner, next] = itemLines(lines, end, item);
      const blanks = next > end && BLANK.test(lines[next - 1]);
      const blocks = parseBlocks(inner, depth + 1);
      isLoose ||= blocks.some((block, k) => k > 0 && block.type === "paragraph" && BLANK.test(inner[block.start - 1]));
      items.push(blocks);
      end = next;
      const follows = end < lines.length && ITEM.exec(lines[end]);
      if (!follows || follows[1].length > 3) break;
      isLoose ||= blanks;
    }
    const first = number === undefined ? null : Number(number);
    return [{ type: "list", first, items, isLoose }, end];
  },

  table(lines, i) {
    const head = cellsOf(lines[i]);
    const sides = cellsOf(lines[i + 1]).map((cell) =>
      cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : null,
    );
    const rows = [];
    let end = i + 2;
    while (end < lines.length && lines[end].includes("|") && !BLANK.test(lines[end])) rows.push(cellsOf(lines[end++]));
    return [{ type: "table", head, sides, rows }, end];
  },

  paragraph(lines, i, depth) {
    let end = i + 1;
    while (end < lines.length && (depth < MOST_NESTING ? !interrupts(lines, end) : !BLANK.test(lines[end]))) end++;
    return [{ type: "paragraph", text: lines.slice(i, end).join("\n") }, end];
  },
};

/** Return the lines of a list item, without its indent, and the line behind it. */
function itemLines(lines, i, [whole, indent, marker, , space]) {
  const wide = space.length === 0 || space.length > 4 ? indent.length + marker.length + 1 : whole.length;
  const inner = [lines[i].slice(Math.min(wide, lines[i].length))];
  let end = i + 1;
  for (; end < lines.length; end++) {
    const line = lines[end];
    if (BLANK.test(line)) {
      // an empty line belongs to the item if something that is indented follows, or the next item
      let next = end + 1;
      while (next < lines.length && BLANK.test(lines[next])) next++;
      if (next === lines.length) return [inner, next];
      const depth = lines[next].search(/\S/);
      if (depth < indent.length + 2 && !ITEM.test(lines[next])) break;
      while (end < next) inner.push(lines[end++].trim());
      end--;
      continue;
    }
    const depth = line.search(/\S/);
    const nested = depth >= indent.length + 2; // two are enough: models indent by 2, 3 or 4
    if (!nested && (BLANK.test(lines[end - 1]) || interrupts(lines, end) || ITEM.test(line))) break;
    inner.push(line.slice(Math.min(depth, wide)));
  }
  return [inner, end];
}

/** Split a row at the bars that are neither escaped nor in code. */
function cellsOf(line) {
  const cells = [""];
  let inCode = false;
  const row = line.trim().replace(/^\|/, "");
  for (let i = 0; i < row.length; i++) {
    if (row[i] === "\\" && row[i + 1] === "|") {
      cells[cells.length - 1] += "|";
      i++;
    } else if (row[i] === "|" && !inCode) cells.push("");
    else {
      if (row[i] === "`") inCode = !inCode;
      cells[cells.length - 1] += row[i];
    }
  }
  if (cells.length > 1 && cells.at(-1).trim() === "") cells.pop();
  return cells.map((cell) => cell.trim());
}

function renderBlock(block, isLive) {
  switch (block.type) {
    case "code":
      return codeBlock(block.text, block.language);
    case "heading":
      return filled(el(`h${Math.min(6, block.level + 1)}`), inline(block.text, isLive)); // h1 is the page's own
    case "rule":
      return el("hr");
    case "quote":
      return filled(
        el("blockquote"),
        block.blocks.map((inner) => renderBlock(inner, isLive)),
      );
    case "list": {
      const start = block.first === null || block.first === 1 ? null : block.first;
      const items = block.items.map((blocks) =>
        filled(
          el("li"),
          blocks.flatMap((inner) => inItem(inner, block, isLive)),
        ),
      );
      return filled(el(block.first === null ? "ul" : "ol", { start, class: block.isLoose ? "loose" : null }), items);
    }
    case "table": {
      const row = (cells, tag) =>
        filled(
          el("tr"),
          block.sides.map((side, i) => filled(el(tag, { class: side }), inline(cells[i] ?? "", isLive))),
        );
      const table = el("table", {}, el("thead", {}, row(block.head, "th")));
      if (block.rows.length)
        table.append(
          filled(
            el("tbody"),
            block.rows.map((cells) => row(cells, "td")),
          ),
        );
      return el("div", { class: "table-scroll", tabindex: "0", role: "group", "aria-label": "Table" }, table);
    }
    default:
      return filled(el("p"), inline(block.text, isLive));
  }
}

const inItem = (block, list, isLive) =>
  block.type === "paragraph" && !list.isLoose ? inline(block.text, isLive) : [renderBlock(block, isLive)];

// ---- within a paragraph --------------------------------------------------------------------------------------------

const PUNCTUATION = /[!-/:-@[-`{-~]/;
const SPECIAL = /[\\`*_~[\]!<h]/g;
const BARE_URL = /https?:\/\/[^\s<>"'`]+/y;
const ANGLE_URL = /<((?:https?:\/\/|mailto:)[^\s<>]+)>/y;
const LINK_TARGET = /\( ?(?:<([^<>\n]*)>|([^\s()<>]*(?:\([^\s()<>]*\)[^\s()<>]*)*))(?: (?:"[^"\n]*"|'[^'\n]*'))? ?\)/y;
const MARKS = { "*": "em", "**": "strong", _: "em", __: "strong", "~~": "del" };

/**
 * Return the nodes of a text. A stack holds what has been opened (marks and brackets) with what stands in it; a closing
 * mark takes the nearest one that fits, and what was opened within stays text.
 */
function inline(text, isLive) {
  const stack = [{ mark: "", nodes: [] }];
  const open = { "*": 0, _: 0, "~": 0 }; // how many of each are on the stack
  let brackets = []; // places on the stack whose bracket may still become a link
  const codeEnds = backtickRuns(text);
  let pending = "";

  const flush = () => {
    if (pending) stack.at(-1).nodes.push(document.createTextNode(pending));
    pending = "";
  };
  const add = (node) => {
    flush();
    stack.at(-1).nodes.push(node);
  };
  /** Turn what was opened from a place on into text, into the one below. */
  const collapse = (place) => {
    flush();
    const frames = stack.splice(place);
    for (const frame of frames) {
      if (frame.mark) stack.at(-1).nodes.push(document.createTextNode(frame.mark));
      if (frame.mark && frame.mark[0] in open) open[frame.mark[0]]--;
      for (const node of frame.nodes) stack.at(-1).nodes.push(node);
    }
    while (brackets.length && brackets.at(-1) >= place) brackets.pop();
  };
  const push = (mark) => {
    flush();
    stack.push({ mark, nodes: [] });
    if (mark[0] in open) open[mark[0]]++;
  };

  let i = 0;
  while (i < text.length) {
    SPECIAL.lastIndex = i;
    const found = SPECIAL.exec(text);
    const at = found ? found.index : text.length;
    pending += text.slice(i, at);
    i = at;
    if (i === text.length) break;
    const character = text[i];

    if (character === "\\" && i + 1 < text.length && PUNCTUATION.test(text[i + 1])) {
      pending += text[i + 1];
      i += 2;
    } else if (character === "`") {
      const size = runLength(text, i, "`");
      const end = codeEnds(size, i + size);
      if (end < 0) pending += text.slice(i, i + size);
      else add(el("code", {}, codeText(text.slice(i + size, end))));
      i = end < 0 ? i + size : end + size;
    } else if (character === "*" || character === "_" || character === "~") {
      i = takeMarks(text, i, character);
    } else if (character === "[" || (character === "!" && text[i + 1] === "[")) {
      const mark = character === "!" ? "![" : "[";
      if (stack.length < MOST_INLINE_NESTING) {
        push(mark);
        brackets.push(stack.length - 1);
      } else pending += mark;
      i += mark.length;
    } else if (character === "]") {
      i = closeBracket(i);
    } else if (character === "<" || character === "h") {
      const pattern = character === "<" ? ANGLE_URL : BARE_URL;
      pattern.lastIndex = i;
      const match = brackets.length && character === "h" ? null : pattern.exec(text);
      const wordBefore = character === "h" && i > 0 && /\w/.test(text[i - 1]);
      const shown = match && (character === "<" ? match[1] : withoutTail(match[0]));
      const link = match && !wordBefore ? linkTo(shown) : null;
      if (link) add(filled(link, [document.createTextNode(shown)]));
      else pending += match ? match[0] : character;
      i += link && character === "h" ? shown.length : match ? match[0].length : 1;
    } else {
      pending += character;
      i++;
    }
  }
  flush();
  if (isLive) for (const frame of stack) if (frame.mark === "**" && frame.nodes.length) frame.strong = true;
  return flatten(stack);

  /** Take a run of one kind of marks: it may close what is open, and open what its rest can. */
  function takeMarks(source, from, mark) {
    const size = runLength(source, from, mark);
    const [canOpen, canClose] = flanking(source, from, size, mark);
    let left = mark === "~" && size !== 2 ? 0 : Math.min(size, 3);
    pending += mark.repeat(size - left); // of longer runs, and of single tildes, the rest is text
    if (canClose) {
      while (left > 0 && open[mark] > 0) {
        let place = stack.length - 1;
        while (stack[place].mark[0] !== mark) place--;
        collapse(place + 1);
        const frame = stack[place];
        const used = Math.min(left, frame.mark.length, 2);
        flush();
        stack.pop();
        open[mark]--;
        const node = filled(el(MARKS[mark.repeat(used)]), frame.nodes);
        if (frame.mark.length > used) {
          push(frame.mark.slice(used));
        }
        add(node);
        left -= used;
      }
    }
    if (left > 0 && canOpen && stack.length < MOST_INLINE_NESTING) push(mark.repeat(left));
    else pending += mark.repeat(left);
    return from + size;
  }

  function closeBracket(at) {
    const place = brackets.pop();
    LINK_TARGET.lastIndex = at + 1;
    const target = place === undefined ? null : LINK_TARGET.exec(text);
    const link = target && linkTo(target[1] ?? target[2]);
    if (!link) {
      if (place !== undefined && place === stack.length - 1) collapse(place);
      pending += "]"; // and the opening one is text, too
      return at + 1;
    }
    collapse(place + 1);
    const frame = stack.pop();
    if (frame.nodes.length === 0) frame.nodes.push(document.createTextNode(target[1] ?? target[2]));
    add(filled(link, frame.nodes));
    brackets = []; // no links in links
    return at + 1 + target[0].length;
  }
}

/** Join what is left open, from the bottom up: marks that were never closed are text. */
function flatten(stack) {
  const nodes = [];
  let into = nodes;
  for (const frame of stack) {
    if (frame.strong) {
      const strong = el("strong");
      into.push(strong);
      strong.append(...frame.nodes);
      continue;
    }
    if (frame.mark) into.push(document.createTextNode(frame.mark));
    for (const node of frame.nodes) into.push(node);
  }
  return nodes;
}

function filled(node, children) {
  for (const child of children) node.append(child); // not by spreading: there may be 100,000
  return node;
}

function runLength(text, i, character) {
  let end = i;
  while (text[end] === character) end++;
  return end - i;
}

/** Return a function that finds the next run of exactly `size` backticks from a place on, or -1. */
function backtickRuns(text) {
  const runs = new Map(); // size -> places, ascending
  for (const match of text.matchAll(/`+/g)) {
    if (!runs.has(match[0].length)) runs.set(match[0].length, { places: [], next: 0 });
    runs.get(match[0].length).places.push(match.index);
  }
  return (size, from) => {
    const known = runs.get(size);
    if (!known) return -1;
    while (known.next < known.places.length && known.places[known.next] < from) known.next++;
    return known.next < known.places.length ? known.places[known.next] : -1;
  };
}

const codeText = (text) => (text.startsWith(" ") && text.endsWith(" ") && text.trim() ? text.slice(1, -1) : text);

/** CommonMark's rules of what may open and close; in figures, `2*3*4` is a product. */
function flanking(text, i, size, mark) {
  const before = text[i - 1] ?? " ";
  const after = text[i + size] ?? " ";
  const [spaceBefore, spaceAfter] = [/\s/.test(before), /\s/.test(after)];
  const [signBefore, signAfter] = [/[\p{P}\p{S}]/u.test(before), /[\p{P}\p{S}]/u.test(after)];
  const left = !spaceAfter && (!signAfter || spaceBefore || signBefore);
  const right = !spaceBefore && (!signBefore || spaceAfter || signAfter);
  if (mark === "_") return [left && (!right || signBefore), right && (!left || signAfter)];
  if (mark === "*" && /[\p{N})]/u.test(before) && /[\p{N}(]/u.test(after)) return [false, false];
  return [left, right];
}

/** Return an empty link to an address, or null if it is none that a page may send people to. */
function linkTo(address) {
  if (!/^(https?:\/\/|mailto:)/i.test(address)) return null;
  try {
    const url = new URL(address);
    if (!["http:", "https:", "mailto:"].includes(url.protocol)) return null;
    return el("a", { href: url.href, target: "_blank", rel: "noopener noreferrer nofollow" });
  } catch {
    return null;
  }
}

/** Leave out what belongs to the sentence rather than the address: its end, and a bracket that was opened before. */
function withoutTail(url) {
  let depth = 0;
  let end = 0;
  for (; end < url.length && depth >= 0; end++) depth += url[end] === "(" ? 1 : url[end] === ")" ? -1 : 0;
  if (depth < 0) end--;
  while (end > 0 && ".,:;!?*_~".includes(url[end - 1])) end--;
  return url.slice(0, end);
}
