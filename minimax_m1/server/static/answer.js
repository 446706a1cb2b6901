// One answer on the page: thinking in a fold, Markdown, tool calls as cards, what it cost, what went wrong.

import { el, flops, icon, iconButton, money, plural, seconds, whole } from "./dom.js";
import { MarkdownStream, codeBlock } from "./markdown.js";

const LEAST_OPEN = 1200; // ms that thinking stays in sight, however fast the answer follows

const NOTES = {
  length: "Cut off: the most tokens were reached.",
  repetition: "Cut off: the model repeated itself.",
  stopped: "Stopped.",
};

/**
 * Shows a message of the assistant and follows it as it grows: {content, reasoning, calls, state, …} (see chat.js).
 * `update` after a change; it touches only what is new.
 */
export class AnswerView {
  #reasoningShown = 0; // characters
  #contentShown = 0;
  #callsShown = 0;
  #touched = false; // the person has opened or closed the fold
  #opened = 0; // when the fold was opened
  #closing = false;

  constructor(message, info, results) {
    this.message = message;
    this.info = info;
    this.waiting = el("p", { class: "waiting" }, el("span", { class: "pulse", "aria-hidden": "true" }), "Reading");
    this.label = el("span", { class: "thinking-label" });
    this.thought = el("div", { class: "thinking-text", tabindex: "0", "aria-label": "Thinking" });
    this.thoughtText = this.thought.appendChild(document.createTextNode(""));
    const summary = el("summary", {}, icon("chevron"), this.label);
    summary.addEventListener("click", () => (this.#touched = true));
    this.fold = el("details", { class: "thinking", hidden: true }, summary, this.thought);
    this.content = el("div", { class: "markdown" });
    this.calls = el("div", { class: "calls" });
    this.note = el("p", { class: "note", hidden: true });
    this.error = el("div", { class: "error", role: "alert", hidden: true });
    this.stats = el("ul", { class: "stats", "aria-label": "What this answer took" });
    this.experts = el(
      "button",
      { type: "button", class: "quiet", hidden: true, data: { action: "experts" } },
      icon("grid"),
      "Experts",
    );
    const again = iconButton("again", "Answer anew", { action: "regenerate" });
    again.classList.add("last-only");
    this.actions = el(
      "div",
      { class: "actions" },
      iconButton("copy", "Copy the answer", { action: "copy" }),
      again,
      this.experts,
    );
    this.foot = el("footer", { class: "turn-foot", hidden: true }, this.actions, this.stats);
    this.element = el(
      "article",
      { class: "turn answer", "aria-label": "Answer" },
      this.waiting,
      this.fold,
      this.content,
      this.calls,
      this.note,
      this.error,
      this.foot,
    );
    this.markdown = null;
    this.update(results);
  }

  /** Show what the message has gained. `results` are the results of its calls that have been given, by id. */
  update(results = new Map()) {
    const { message } = this;
    const running = message.state === "running";
    this.element.classList.toggle("running", running);
    this.element.setAttribute("aria-busy", String(running));
    this.waiting.hidden = !running || Boolean(message.reasoning || message.content || message.calls.length);
    this.#showThinking(running);
    this.#showContent(running);
    if (message.calls.length !== this.#callsShown || !running) this.#showCalls(results, running);
    const note = message.state === "stopped" ? NOTES.stopped : NOTES[message.finish];
    this.note.hidden = !note;
    this.note.textContent = note ?? "";
    this.foot.hidden = running || (message.state === "error" && !message.content && !message.reasoning);
    if (!running) this.#showStats();
    this.experts.hidden = running || !message.routing;
  }

  #showThinking(running) {
    const { message } = this;
    if (!message.reasoning) return;
    const isThinking = running && !message.content && !message.calls.length;
    if (this.fold.hidden) {
      this.fold.hidden = false;
      this.fold.open = running;
      this.#opened = performance.now();
    }
    if (!isThinking && this.fold.open && !this.#closing) {
      this.#closing = true;
      setTimeout(() => (this.fold.open &&= this.#touched), Math.max(0, this.#opened + LEAST_OPEN - performance.now()));
    }
    this.fold.classList.toggle("active", isThinking);
    if (message.reasoning.length > this.#reasoningShown) {
      const atEnd = this.thought.scrollHeight - this.thought.scrollTop - this.thought.clientHeight < 24;
      this.thoughtText.appendData(message.reasoning.slice(this.#reasoningShown));
      this.#reasoningShown = message.reasoning.length;
      if (running && atEnd) this.thought.scrollTop = this.thought.scrollHeight;
    }
    this.tick();
  }

  /** Let the timer of the thinking run. */
  tick() {
    const { thinkingTokens, thinkingMs, thinkingStarted, state, content, calls } = this.message;
    const isThinking = state === "running" && !content && !calls.length;
    const ms = isThinking ? performance.now() - thinkingStarted : thinkingMs;
    const tokens = thinkingTokens ? `, ${plural(thinkingTokens, "token")}` : "";
    this.label.textContent = isThinking ? `Thinking ${seconds(ms)}${tokens}` : `Thought for ${seconds(ms)}${tokens}`;
  }

  #showContent(running) {
    const { message } = this;
    if (message.content.length > this.#contentShown || (!running && this.markdown)) {
      const more = message.content.slice(this.#contentShown);
      this.#contentShown = message.content.length;
      if (message.isJson) this.#showJson(running);
      else {
        this.markdown ??= new MarkdownStream(this.content);
        if (running) this.markdown.push(more);
        else {
          this.markdown.source += more;
          this.markdown.finish();
          this.markdown = null;
        }
      }
    }
  }

  #showJson(running) {
    let text = this.message.content;
    if (!running) {
      try {
        text = JSON.stringify(JSON.parse(text), null, 2);
      } catch {
        // cut off: as it came
      }
    }
    this.content.replaceChildren(codeBlock(text, "json"));
  }

  #showCalls(results, running) {
    const { calls } = this.message;
    if (!calls.length) return;
    this.#callsShown = calls.length;
    const typed = [...this.calls.querySelectorAll("textarea")].map((area) => area.value);
    const cards = calls.map((call, i) => callCard(call, results.get(call.id), typed[i] ?? ""));
    this.calls.replaceChildren(...cards);
    if (!running && calls.some((call) => !results.has(call.id))) {
      const send = el("button", { type: "button", class: "button primary", data: { action: "send-results" } });
      send.append(calls.length > 1 ? "Send the results" : "Send the result");
      this.calls.append(el("div", { class: "call-actions" }, send));
    }
  }

  #showStats() {
    const { usage, firstMs, writingMs } = this.message;
    const lines = [];
    if (usage) {
      const tokens = usage.completion_tokens;
      const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
      const from = cached ? `, ${whole(cached)} of them from the cache` : "";
      const prompt = `${plural(usage.prompt_tokens, "token")} of prompt${from}`;
      lines.push([plural(tokens, "token"), `Of the answer with its thinking, after ${prompt}`]);
      if (tokens > 1 && writingMs >= 10)
        lines.push([`${whole(((tokens - 1) / writingMs) * 1000)} tokens/s`, "Speed of writing"]);
    }
    if (firstMs) lines.push([`first after ${seconds(firstMs)}`, "Time to the first token"]);
    if (usage?.cost !== undefined) lines.push([money(usage.cost, this.info.currency), "Cost at this server’s prices"]);
    if (usage?.flops !== undefined)
      lines.push([flops(usage.flops), "Floating-point operations, by the model’s formula"]);
    this.stats.replaceChildren(...lines.map(([text, title]) => el("li", { title }, text)));
  }

  /** Show what went wrong, with a way to try again; null takes it away. */
  showError(error) {
    this.error.hidden = !error;
    this.error.replaceChildren();
    if (!error) return;
    const retry = el(
      "button",
      { type: "button", class: "button", data: { action: "retry" } },
      icon("again"),
      "Try again",
    );
    const text = el(
      "p",
      {},
      error.message,
      error.broken && (this.message.content || this.message.reasoning) ? " What came is kept." : "",
    );
    const row = el("div", { class: "error-row" }, retry);
    this.error.append(el("div", { class: "error-head" }, icon("alert"), text), row);
    if (error.status === 401) {
      const input = el("input", {
        type: "password",
        placeholder: "API key",
        "aria-label": "API key",
        autocomplete: "off",
      });
      const form = el(
        "form",
        { class: "key-form", data: { form: "key" } },
        input,
        el("button", { class: "button primary" }, "Use this key"),
      );
      row.replaceChildren(form);
      queueMicrotask(() => input.focus());
    } else if (error.retryAfter) row.append(countdown(error.retryAfter));
  }
}

/** A text that counts the seconds down while it is on the page. */
function countdown(left) {
  const text = el("span", { class: "small" });
  const show = () => (text.textContent = left > 0 ? `The server asks to wait ${left} s.` : "The wait is over.");
  show();
  const timer = setInterval(() => {
    left--;
    show();
    if (left <= 0 || !text.isConnected) clearInterval(timer);
  }, 1000);
  return text;
}

function callCard(call, result, typed) {
  let shown = call.arguments;
  try {
    shown = JSON.stringify(JSON.parse(call.arguments), null, 2);
  } catch {
    // still on its way, or not JSON: as it came
  }
  const card = el(
    "section",
    { class: "call", "aria-label": `Call of ${call.name}`, data: { call: call.id } },
    el("header", {}, icon("tool"), el("code", {}, call.name)),
    el("pre", { tabindex: "0", "aria-label": "Arguments" }, el("code", {}, shown)),
  );
  if (result !== undefined)
    card.append(el("p", { class: "call-label" }, "Result"), el("pre", { class: "call-result" }, result || "(empty)"));
  else {
    const area = el("textarea", {
      rows: 2,
      class: "mono",
      placeholder: "What the tool returns",
      "aria-label": `Result of ${call.name}`,
    });
    area.value = typed;
    card.append(area);
  }
  return card;
}
