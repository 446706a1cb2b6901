// The conversation: what was said, the request that is running, and the turns on the page.
//
// A message is {role: "user", content}, {role: "tool", tool_call_id, content}, or an answer: {role: "assistant",
// content, reasoning, calls: [{id, name, arguments}], state: running | done | stopped | error, error, finish, isJson,
// usage, routing, thinkingTokens, thinkingMs, firstMs, writingMs}.

import { AnswerView } from "./answer.js";
import { confirmOn, copyText, el, iconButton } from "./dom.js";
import { loadConversation, newConversation, saveConversation } from "./conversations.js";
import { ApiError, apiKey, streamChat } from "./stream.js";

const NEAR_END = 48; // pixels

export class Chat {
  #running = null; // the AbortController of the answer that is being written
  #views = []; // of each message; null for results of tools, which stand in the cards of their calls

  /** `onChange` follows every change; the others are told of what goes beyond the conversation. */
  constructor({ turns, scroller, jump, announcer, info, settings, onChange, onDone, onExperts, onKey, onProblem }) {
    Object.assign(this, { turns, scroller, jump, announcer, info, settings });
    Object.assign(this, { onChange, onDone, onExperts, onKey, onProblem });
    this.conversation = newConversation();
    this.isAtEnd = true;
    this.#followEnd();
    turns.addEventListener("click", (event) => this.#onClick(event));
    turns.addEventListener("submit", (event) => this.#onSubmit(event));
    turns.addEventListener("keydown", (event) => this.#onKeydown(event));
    window.addEventListener("pagehide", () => this.isRunning && this.#save());
  }

  get isRunning() {
    return this.#running !== null;
  }

  get isEmpty() {
    return this.conversation.messages.length === 0;
  }

  /** Tokens of the context that the last answer filled, or null. */
  get contextTokens() {
    return this.conversation.messages.findLast((message) => message.usage)?.usage.total_tokens ?? null;
  }

  // ---- what a person can do ----------------------------------------------------------------------------------------

  /** Show a kept conversation, or a new one. */
  open(id = null) {
    if (this.isRunning) {
      this.stop();
      this.#running = null;
      this.conversation.messages.at(-1).state = "stopped";
      this.#save();
    }
    this.conversation = (id && loadConversation(id)) || newConversation();
    for (const message of this.conversation.messages) if (message.state === "running") message.state = "stopped";
    this.#views = [];
    this.turns.replaceChildren();
    for (const message of this.conversation.messages) this.#show(message);
    this.#mark();
    this.toEnd();
    this.onChange();
  }

  /** Say something; returns whether it was taken. */
  send(text) {
    if (this.isRunning || !text.trim() || !this.#mayAsk()) return false;
    this.#add({ role: "user", content: text });
    this.#ask();
    return true;
  }

  /** Stop the answer that is being written; what came stays. */
  stop() {
    this.#running?.abort();
  }

  /** Answer the last message anew. */
  regenerate() {
    if (this.isRunning || !this.#mayAsk()) return;
    while (this.conversation.messages.at(-1)?.role === "assistant") this.#drop();
    if (!this.isEmpty) this.#ask();
  }

  /** Replace the last message of the person, and what followed. */
  edit(text) {
    if (this.isRunning || !text.trim() || !this.#mayAsk()) return;
    while (this.conversation.messages.at(-1)?.role !== "user") this.#drop();
    this.#drop();
    this.send(text);
  }

  /** Give the results of the last answer's calls; the answer goes on from there. */
  sendResults(results) {
    if (this.isRunning || !this.#mayAsk()) return;
    const answer = this.conversation.messages.at(-1);
    for (const [id, content] of results) this.#add({ role: "tool", tool_call_id: id, content });
    this.#views[this.conversation.messages.indexOf(answer)].update(this.#results());
    this.#ask();
  }

  #mayAsk() {
    if (this.settings.problem) this.onProblem(this.settings.problem);
    return !this.settings.problem;
  }

  // ---- the request -------------------------------------------------------------------------------------------------

  async #ask() {
    const body = {
      model: this.info.model,
      messages: this.#history(),
      ...this.settings.requestFields(),
      stream: true,
      stream_options: { include_usage: true, continuous_usage_stats: true },
    };
    const message = {
      role: "assistant",
      content: "",
      reasoning: "",
      calls: [],
      state: "running",
      finish: null,
      isJson: Boolean(body.response_format),
      thinkingTokens: 0,
      thinkingMs: 0,
    };
    const view = this.#add(message);
    const controller = (this.#running = new AbortController());
    const pace = new Pace(() => {
      view.update();
      this.#stayAtEnd();
    });
    const timer = setInterval(() => message.reasoning && view.tick(), 100);
    this.onChange();
    this.toEnd();
    this.#save();
    const started = performance.now();
    let last = started;
    try {
      for await (const chunk of streamChat(body, controller.signal)) {
        const now = performance.now();
        if (take(chunk, message, now)) {
          message.firstMs ??= now - started;
          last = now;
          pace.ask();
        }
        message.writingMs = last - started - (message.firstMs ?? 0);
      }
      message.state = "done";
    } catch (error) {
      if (controller.signal.aborted) message.state = "stopped";
      else if (error instanceof ApiError) {
        const { status, retryAfter, broken } = error;
        Object.assign(message, { state: "error", error: { message: error.message, status, retryAfter, broken } });
      } else throw error;
    } finally {
      clearInterval(timer);
      pace.stop();
      if (message.reasoning && !message.thinkingMs) message.thinkingMs = last - message.thinkingStarted;
      if (this.#running === controller) {
        this.#running = null;
        this.#finish(message, view);
      } // else another conversation has been opened meanwhile
    }
  }

  #finish(message, view) {
    view.update(this.#results());
    view.showError(message.error ?? null);
    if (message.error?.status === 401) this.onKey();
    this.#stayAtEnd();
    this.#save();
    this.onChange();
    if (message.state === "done") this.onDone(message, this.#questionOf(message));
    if (message.state === "done") this.announcer.textContent = spoken(message);
    else if (message.state === "stopped") this.announcer.textContent = "Stopped";
  }

  /** Return the messages as the API wants them. */
  #history() {
    const results = this.#results();
    const messages = [];
    if (this.settings.values.system.trim()) messages.push({ role: "system", content: this.settings.values.system });
    for (const message of this.conversation.messages) {
      if (message.role !== "assistant") {
        messages.push(message.role === "tool" ? { ...message } : { role: "user", content: message.content });
        continue;
      }
      const turn = { role: "assistant", content: message.content };
      if (message.reasoning) turn.reasoning_content = message.reasoning;
      const calls = message.calls.filter((call) => results.has(call.id)); // those without result were passed over
      if (calls.length)
        turn.tool_calls = calls.map(({ id, name, arguments: text }) => ({
          id,
          type: "function",
          function: { name, arguments: text },
        }));
      if (turn.content || calls.length) messages.push(turn);
    }
    return messages;
  }

  #questionOf(answer) {
    const { messages } = this.conversation;
    return messages.slice(0, messages.indexOf(answer)).findLast((message) => message.role === "user")?.content ?? "";
  }

  #results() {
    const tools = this.conversation.messages.filter((message) => message.role === "tool");
    return new Map(tools.map((message) => [message.tool_call_id, message.content]));
  }

  // ---- turns on the page -------------------------------------------------------------------------------------------

  #add(message) {
    this.conversation.messages.push(message);
    const view = this.#show(message);
    this.#mark();
    return view;
  }

  #show(message) {
    let view = null;
    if (message.role === "user") view = { element: userTurn(message.content) };
    if (message.role === "assistant") {
      view = new AnswerView(message, this.info, this.#results());
      if (message.error) view.showError(message.error);
    }
    this.#views.push(view);
    if (view) this.turns.append(view.element);
    return view;
  }

  #drop() {
    this.conversation.messages.pop();
    this.#views.pop()?.element.remove();
  }

  /** Mark the turns that can be answered anew or edited: the last ones. */
  #mark() {
    for (const turn of this.turns.querySelectorAll(".last")) turn.classList.remove("last");
    const { messages } = this.conversation;
    for (const role of ["user", "assistant"]) {
      const i = messages.findLastIndex((message) => message.role === role);
      if (i >= 0 && (role === "user" || i === messages.length - 1)) this.#views[i].element.classList.add("last");
    }
  }

  #save() {
    this.conversation.updated = Date.now();
    saveConversation(this.conversation);
  }

  #onClick(event) {
    const button = event.target.closest("button[data-action]");
    if (!button) return;
    const place = this.#views.findIndex((view) => view?.element.contains(button));
    const message = this.conversation.messages[place];
    const { action } = button.dataset;
    if (action === "copy-code") this.#copy(button, button.closest(".code").querySelector("code").textContent);
    else if (action === "copy") this.#copy(button, message.content);
    else if (action === "regenerate" || action === "retry") this.regenerate();
    else if (action === "experts") this.onExperts(message, this.#questionOf(message), button);
    else if (action === "edit") this.#startEdit(this.#views[place].element, message.content);
    else if (action === "cancel-edit") this.#endEdit(this.#views[place].element);
    else if (action === "send-results") this.sendResults(typedResults(this.#views[place].element));
  }

  async #copy(button, text) {
    const done = await copyText(text);
    confirmOn(button, done);
    this.announcer.textContent = done ? "Copied" : "The browser did not allow the copy";
  }

  #onSubmit(event) {
    event.preventDefault();
    const { form } = event.target.dataset;
    if (form === "edit") this.edit(event.target.querySelector("textarea").value);
    if (form === "key") {
      apiKey.set(event.target.querySelector("input").value.trim());
      this.settings.showKey();
      this.regenerate();
    }
  }

  #onKeydown(event) {
    const form = event.target.closest("form[data-form=edit]");
    if (!form || event.isComposing) return;
    if (event.key === "Escape") {
      event.stopPropagation();
      this.#endEdit(form.closest(".turn"));
    } else if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      form.requestSubmit();
    }
  }

  #startEdit(turn, text) {
    if (this.isRunning || turn.querySelector("form")) return;
    const area = el("textarea", { rows: Math.min(12, text.split("\n").length + 1), "aria-label": "Edit the message" });
    area.value = text;
    const cancel = el("button", { type: "button", class: "button", data: { action: "cancel-edit" } }, "Cancel");
    const form = el("form", { class: "edit", data: { form: "edit" } }, area);
    form.append(el("div", { class: "edit-actions" }, cancel, el("button", { class: "button primary" }, "Send")));
    turn.classList.add("editing");
    turn.append(form);
    area.focus();
    area.setSelectionRange(text.length, text.length);
  }

  #endEdit(turn) {
    turn.querySelector("form").remove();
    turn.classList.remove("editing");
    turn.querySelector("[data-action=edit]").focus();
  }

  // ---- the end of the page -----------------------------------------------------------------------------------------

  #followEnd() {
    let top = 0;
    this.scroller.addEventListener(
      "scroll",
      () => {
        const { scrollTop, scrollHeight, clientHeight } = this.scroller;
        if (scrollHeight - scrollTop - clientHeight < NEAR_END) this.isAtEnd = true;
        else if (scrollTop < top || !this.isRunning) this.isAtEnd = false; // growing does not leave the end
        top = scrollTop;
        this.jump.hidden = this.isAtEnd;
      },
      { passive: true },
    );
    this.scroller.addEventListener(
      "wheel",
      (event) => {
        if (event.deltaY < 0 && this.scroller.scrollTop > 0) this.isAtEnd = false;
      },
      { passive: true },
    );
    this.jump.addEventListener("click", () => this.toEnd());
  }

  toEnd() {
    this.isAtEnd = true;
    this.jump.hidden = true;
    this.#stayAtEnd();
  }

  #stayAtEnd() {
    if (this.isAtEnd) this.scroller.scrollTop = this.scroller.scrollHeight;
  }
}

/** Add a chunk to a message; return whether it brought text. */
function take(chunk, message, now) {
  if (chunk.usage) message.usage = chunk.usage;
  if (chunk.routing) message.routing = chunk.routing[0];
  const counted = message.usage?.completion_tokens_details?.reasoning_tokens;
  if (counted) message.thinkingTokens = counted;
  const choice = chunk.choices?.[0];
  if (!choice) return false;
  if (choice.finish_reason) message.finish = choice.stop_reason === "repetition" ? "repetition" : choice.finish_reason;
  const { content, reasoning_content: reasoning, tool_calls: calls = [] } = choice.delta ?? {};
  if (reasoning) {
    message.thinkingStarted ??= now;
    message.reasoning += reasoning;
    if (!counted) message.thinkingTokens = message.usage?.completion_tokens ?? message.thinkingTokens + 1;
  }
  if ((content || calls.length) && message.reasoning && !message.thinkingMs)
    message.thinkingMs = Math.max(1, now - message.thinkingStarted);
  if (content) message.content += content;
  for (const { index, id, function: called } of calls) {
    const call = (message.calls[index] ??= { id, name: "", arguments: "" });
    call.name += called?.name ?? "";
    call.arguments += called?.arguments ?? "";
  }
  return Boolean(content || reasoning || calls.length);
}

/** Lets a view follow fast changes without taking the page's time: once a frame, and after a slow one a pause. */
class Pace {
  #frame = 0;
  #pause = 0;
  #asked = false;

  constructor(work) {
    this.work = work;
  }

  ask() {
    this.#asked = true;
    if (this.#frame || this.#pause) return;
    this.#frame = requestAnimationFrame(() => {
      this.#frame = 0;
      this.#asked = false;
      const start = performance.now();
      this.work();
      const took = performance.now() - start;
      if (took > 8) this.#pause = setTimeout(() => this.#resume(), 8 * took);
    });
  }

  #resume() {
    this.#pause = 0;
    if (this.#asked) this.ask();
  }

  stop() {
    cancelAnimationFrame(this.#frame);
    clearTimeout(this.#pause);
  }
}

function userTurn(text) {
  const edit = iconButton("edit", "Edit and send again", { action: "edit" });
  edit.classList.add("last-only");
  return el("article", { class: "turn user", "aria-label": "You" }, edit, el("div", { class: "bubble" }, text));
}

function typedResults(turn) {
  const areas = [...turn.querySelectorAll(".call textarea")];
  return areas.map((area) => [area.closest(".call").dataset.call, area.value]);
}

/** What a screen reader says when an answer is complete. */
function spoken(message) {
  if (message.calls.length) return `The model calls ${message.calls.map((call) => call.name).join(", ")}`;
  const text = message.content.replace(/[`*_#|]+/g, " ").trim();
  return text.length > 600 ? `${text.slice(0, 500)} … The answer is complete.` : text || "The answer is empty.";
}
