// The controls: what is kept of them, the form, and the fields of a request that follow from them.

import { el, whole } from "./dom.js";
import { apiKey } from "./stream.js";

const KEPT = "minimax-m1/settings";

const EXAMPLE_TOOL = [
  {
    type: "function",
    function: {
      name: "get_weather",
      description: "The weather of a city, now.",
      parameters: {
        type: "object",
        properties: { city: { type: "string", enum: ["Paris", "Oslo", "Kyoto", "Lima"] } },
        required: ["city"],
        additionalProperties: false,
      },
    },
  },
];
const EXAMPLE_SCHEMA = {
  type: "object",
  properties: { result: { type: "integer" } },
  required: ["result"],
  additionalProperties: false,
};

/** What the person has chosen, and the form that shows it. Calls `onChange` after each change. */
export class Settings {
  #inputs = {}; // name -> {read, write, row}
  #texts = {}; // name -> the error that stands under a field, or ""

  constructor(form, info, onChange) {
    this.info = info;
    this.onChange = onChange;
    const { temperature, top_p, top_k, max_tokens, thinking_budget } = info.defaults;
    this.defaults = {
      temperature: temperature ?? 1,
      top_p: top_p ?? 1,
      top_k: top_k ?? 0,
      max_tokens: max_tokens ?? null,
      seed: null,
      thinking:
        thinking_budget === null || thinking_budget === undefined ? "unlimited" : thinking_budget > 0 ? "limit" : "off",
      thinking_budget: thinking_budget || 1000,
      expert_threshold: 1,
      routing_log: true,
      system: "",
      schema: "",
      tools: "",
      tool_choice: "auto",
    };
    this.values = { ...this.defaults, ...kept(this.defaults) };
    this.#build(form);
    this.#show();
  }

  /** Return whatever keeps a request from being sent: {field, message}, or null. */
  get problem() {
    const field = Object.keys(this.#texts).find((name) => this.#texts[name]);
    return field ? { field, message: this.#texts[field] } : null;
  }

  /** Say in a few words what differs from the defaults. */
  get summary() {
    const { values: now, defaults: then } = this;
    const words = [];
    for (const name of ["temperature", "top_p", "top_k", "max_tokens", "seed", "expert_threshold"])
      if (now[name] !== then[name] && now[name] !== null) words.push(`${LABELS[name]} ${now[name]}`);
    if (now.thinking === "off" && then.thinking !== "off") words.push("no thinking");
    if (now.thinking === "limit" && (then.thinking !== "limit" || now.thinking_budget !== then.thinking_budget))
      words.push(`thinking ≤ ${whole(now.thinking_budget)}`);
    if (now.thinking === "unlimited" && then.thinking !== "unlimited") words.push("thinking unlimited");
    if (now.system.trim()) words.push("system prompt");
    if (now.schema.trim()) words.push("JSON schema");
    if (now.tools.trim())
      words.push(this.tools.length ? `tools: ${this.tools.map((tool) => tool.function.name).join(", ")}` : "tools");
    return words;
  }

  get tools() {
    return parseTools(this.values.tools).tools;
  }

  /** Return the fields of a chat request, messages and stream left out. */
  requestFields() {
    const now = this.values;
    const fields = { temperature: now.temperature, top_p: now.top_p };
    if (now.top_k > 0) fields.top_k = now.top_k;
    if (now.max_tokens !== null) fields.max_tokens = now.max_tokens;
    if (now.seed !== null) fields.seed = now.seed;
    fields.thinking_token_budget = { off: 0, limit: now.thinking_budget, unlimited: -1 }[now.thinking];
    if (now.expert_threshold < 1) fields.expert_threshold = now.expert_threshold;
    if (now.routing_log) fields.routing_log = "tokens";
    if (this.tools.length) {
      fields.tools = this.tools;
      fields.tool_choice = ["auto", "none", "required"].includes(now.tool_choice)
        ? now.tool_choice
        : { type: "function", function: { name: now.tool_choice } };
    }
    if (now.schema.trim())
      fields.response_format = { type: "json_schema", json_schema: { name: "answer", schema: JSON.parse(now.schema) } };
    return fields;
  }

  /** Go back to the defaults; the key stays. */
  reset() {
    this.values = { ...this.defaults };
    this.#show();
    this.#keep();
  }

  // ---- the form ----------------------------------------------------------------------------------------------------

  #build(form) {
    form.addEventListener("submit", (event) => event.preventDefault());
    form.append(
      group(
        "Sampling",
        this.#slider("temperature", 0, 2, 0.05, "0 takes the most probable token each time; higher is more varied."),
        this.#slider("top_p", 0.05, 1, 0.05, "Draw from the most probable tokens that hold this share together."),
        this.#number("top_k", 0, 100_000, "Draw from this many most probable tokens; 0: from all."),
        this.#number(
          "max_tokens",
          1,
          this.info.max_model_len,
          "Of the answer, thinking included. Empty: what the context leaves.",
        ),
        this.#number("seed", 0, 2 ** 53 - 1, "The same seed draws the same answer. Empty: another one each time."),
      ),
      group(
        "Thinking",
        this.#choice(
          "thinking",
          { unlimited: "As long as it takes", limit: "At most …", off: "Off" },
          "How long the model may think before it answers.",
        ),
        this.#number("thinking_budget", 1, 10_000_000, "Tokens; then the thinking is closed and the answer begins."),
      ),
      group(
        "Experts",
        this.#slider(
          "expert_threshold",
          0.05,
          1,
          0.05,
          "A token uses its experts in order until their weights reach this share; 1 is the model’s own choice, " +
            "lower is faster.",
        ),
        this.#check("routing_log", "Record which experts each token goes to, for the view of an answer."),
      ),
      group("Prompt", this.#text("system", "What the model should know or be. M1 was trained with one.", 3)),
      group(
        "Form of the answer",
        this.#text(
          "schema",
          "A JSON schema that the answer has to follow.",
          5,
          EXAMPLE_SCHEMA,
          (text) => parseSchema(text).error,
        ),
      ),
      group(
        "Tools",
        this.#text(
          "tools",
          "A JSON list of functions, as in OpenAI’s API. You play the tool: type what it returns." +
            (this.info.abilities ? " The shipped model knows of no tools; below, it can be made to call one." : ""),
          6,
          EXAMPLE_TOOL,
          (text) => parseTools(text).error,
        ),
        this.#choice("tool_choice", { auto: "The model decides" }, "Whether it has to call one."),
      ),
      group("Access", this.#key()),
    );
  }

  /** Make a row: label, control, help, error; and remember how to read and write it. */
  #row(name, control, help, { read, write, extra = null, check = null, inline = false }) {
    const id = `set-${name}`;
    control.id = id;
    const error = el("p", { class: "field-error", id: `${id}-error`, role: "alert" });
    control.setAttribute("aria-describedby", `${id}-help ${id}-error`);
    const row = el(
      "div",
      { class: "field", data: { field: name } },
      el("div", { class: "field-head" }, el("label", { for: id }, LABELS[name]), inline ? control : extra),
      inline ? null : control,
      error,
      el("p", { class: "help", id: `${id}-help` }, help),
    );
    const note = (message) => {
      this.#texts[name] = message;
      error.textContent = message;
      control.setAttribute("aria-invalid", String(Boolean(message)));
    };
    control.addEventListener("input", () => {
      const { value, error: wrong = "" } = read();
      note(wrong || (check ? check(value) : ""));
      if (wrong) return;
      this.values[name] = value;
      this.#follow();
      this.#keep();
    });
    this.#inputs[name] = {
      row,
      write: (value) => {
        write(value);
        note(check ? check(value) : "");
      },
    };
    return row;
  }

  #slider(name, min, max, step, help) {
    const shown = el("input", {
      type: "number",
      class: "beside",
      min,
      max,
      step: "any",
      "aria-label": `${LABELS[name]}, as a number`,
    });
    const range = el("input", { type: "range", min, max, step });
    const row = this.#row(name, range, help, {
      extra: shown,
      read: () => {
        shown.value = range.value;
        return { value: Number(range.value) };
      },
      write: (value) => {
        range.value = value;
        shown.value = value;
      },
    });
    shown.addEventListener("change", () => {
      const value = Number(shown.value);
      range.value = Number.isFinite(value) ? value : this.defaults[name];
      range.dispatchEvent(new Event("input", { bubbles: true }));
    });
    return row;
  }

  #number(name, min, max, help) {
    const placeholder = this.defaults[name] === null ? EMPTY[name] : "";
    const input = el("input", { type: "text", class: "beside", inputmode: "numeric", placeholder });
    return this.#row(name, input, help, {
      inline: true,
      read: () => {
        const text = input.value.trim();
        if (!text) return { value: this.defaults[name] };
        const value = Number(text.replaceAll(",", ""));
        const fits = Number.isInteger(value) && value >= min && value <= max;
        return fits ? { value } : { error: `A whole number from ${whole(min)} to ${whole(max)}` };
      },
      write: (value) => (input.value = value ?? ""),
    });
  }

  #choice(name, options, help) {
    const select = el("select", {}, ...Object.entries(options).map(([value, text]) => el("option", { value }, text)));
    return this.#row(name, select, help, {
      read: () => ({ value: select.value }),
      write: (value) => (select.value = value),
    });
  }

  #check(name, help) {
    const box = el("input", { type: "checkbox", class: "switch", role: "switch" });
    return this.#row(name, box, help, {
      inline: true,
      read: () => ({ value: box.checked }),
      write: (value) => (box.checked = value),
    });
  }

  #text(name, help, rows, example = null, check = null) {
    const area = el("textarea", { rows, spellcheck: check ? "false" : null, class: check ? "mono" : null });
    let insert = null;
    if (example) {
      insert = el("button", { type: "button", class: "link", data: { example: name } }, "Example");
      insert.addEventListener("click", () => {
        area.value = JSON.stringify(example, null, 1);
        area.dispatchEvent(new Event("input"));
        area.focus();
      });
    }
    return this.#row(name, area, help, {
      extra: insert,
      check,
      read: () => ({ value: area.value }),
      write: (value) => (area.value = value),
    });
  }

  #key() {
    const input = el("input", {
      type: "password",
      autocomplete: "off",
      id: "set-key",
      "aria-describedby": "set-key-help",
    });
    input.addEventListener("input", () => {
      apiKey.set(input.value.trim());
      this.onChange();
    });
    this.#inputs.key = { write: () => (input.value = apiKey.get()) };
    const help = this.info.needs_key ? "This server wants one." : "This server needs none.";
    return el(
      "div",
      { class: "field" },
      el("div", { class: "field-head" }, el("label", { for: "set-key" }, "API key")),
      input,
      el("p", { class: "help", id: "set-key-help" }, `${help} Kept until the tab is closed.`),
    );
  }

  /** Write all values into the form. */
  #show() {
    this.#follow();
    for (const [name, { write }] of Object.entries(this.#inputs)) write(this.values[name]);
  }

  /** Show the key that another part of the page has taken. */
  showKey() {
    this.#inputs.key.write();
  }

  /** Let fields follow from others: the budget is there when it counts, the choice of tools has their names. */
  #follow() {
    this.#inputs.thinking_budget.row.hidden = this.values.thinking !== "limit";
    const names = this.tools.map((tool) => tool.function.name);
    this.#inputs.tool_choice.row.hidden = names.length === 0;
    const select = this.#inputs.tool_choice.row.querySelector("select");
    const options = { auto: "The model decides", none: "Calls none", required: "Has to call one" };
    for (const name of names) options[name] = `Has to call ${name}`;
    select.replaceChildren(...Object.entries(options).map(([value, text]) => el("option", { value }, text)));
    if (!(this.values.tool_choice in options)) this.values.tool_choice = "auto";
    select.value = this.values.tool_choice;
  }

  #keep() {
    const changed = Object.entries(this.values).filter(([name, value]) => value !== this.defaults[name]);
    try {
      localStorage.setItem(KEPT, JSON.stringify(Object.fromEntries(changed)));
    } catch {
      // no room, or no storage: they hold until the page is left
    }
    this.onChange();
  }
}

const EMPTY = { max_tokens: "all", seed: "random" }; // what an empty field means

const LABELS = {
  temperature: "Temperature",
  top_p: "Top p",
  top_k: "Top k",
  max_tokens: "Maximum tokens",
  seed: "Seed",
  thinking: "Thinking",
  thinking_budget: "Thinking budget",
  expert_threshold: "Expert threshold",
  routing_log: "Routing log",
  system: "System prompt",
  schema: "JSON schema",
  tools: "Functions",
  tool_choice: "Calls",
};

function kept(defaults) {
  try {
    const values = Object.entries(JSON.parse(localStorage.getItem(KEPT) ?? "{}"));
    return Object.fromEntries(values.filter(([name]) => name in defaults));
  } catch {
    return {};
  }
}

const group = (title, ...rows) => el("section", { class: "group", "aria-label": title }, el("h3", {}, title), ...rows);

// ---- JSON that people type -----------------------------------------------------------------------------------------

/** Read tools: a list or a single one, in OpenAI's form or bare. Return {tools, error}; one of them is empty. */
export function parseTools(text) {
  if (!text.trim()) return { tools: [], error: "" };
  const { value, error } = parseJson(text);
  if (error) return { tools: [], error };
  const tools = [];
  for (const [i, entry] of (Array.isArray(value) ? value : [value]).entries()) {
    const tool = entry?.function ?? entry;
    const place = Array.isArray(value) ? `Tool ${i + 1}` : "The tool";
    const problem = toolProblem(tool);
    if (problem) return { tools: [], error: `${place} ${problem}` };
    if (tools.some((other) => other.function.name === tool.name))
      return { tools: [], error: `Two tools are named ${tool.name}` };
    tools.push({ type: "function", function: tool });
  }
  return { tools, error: "" };
}

function toolProblem(tool) {
  if (typeof tool !== "object" || tool === null || Array.isArray(tool)) return "is not an object";
  if (typeof tool.name !== "string" || !tool.name) return "has no “name”";
  const { parameters } = tool;
  if (parameters !== undefined && (typeof parameters !== "object" || parameters === null || Array.isArray(parameters)))
    return "has “parameters” that are not an object";
  return "";
}

export function parseSchema(text) {
  if (!text.trim()) return { schema: null, error: "" };
  const { value, error } = parseJson(text);
  if (error) return { schema: null, error };
  if (typeof value !== "object" || value === null || Array.isArray(value))
    return { schema: null, error: "A schema is an object" };
  return { schema: value, error: "" };
}

/** Parse JSON; say in which line it goes wrong. */
function parseJson(text) {
  try {
    return { value: JSON.parse(text), error: "" };
  } catch (error) {
    const position = /position (\d+)/.exec(error.message);
    const told = /line (\d+)/.exec(error.message);
    const line = position ? text.slice(0, Number(position[1])).split("\n").length : told ? Number(told[1]) : null;
    const reason = error.message.replace(/ in JSON at position.*| \(line \d+.*\)|^JSON\.parse: | at line \d+.*/g, "");
    return { value: null, error: line ? `Not JSON, line ${line}: ${reason}` : `Not JSON: ${reason}` };
  }
}
