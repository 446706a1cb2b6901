// The page: reads what is served, then puts the parts together: side bar, conversation, composer, panels, keys.

import { Chat } from "./chat.js";
import { deleteAll, deleteConversation, listConversations, openHere } from "./conversations.js";
import { compact, el, icon, iconButton, plural, whole } from "./dom.js";
import { ExpertsView } from "./experts.js";
import { Settings } from "./settings.js";
import { apiKey, request } from "./stream.js";
import { showUsage } from "./usage.js";

const $ = (id) => document.getElementById(id);
const DOCKED = {
  sidebar: matchMedia("(min-width: 900px)"),
  controls: matchMedia("(min-width: 1100px)"),
  experts: matchMedia("(min-width: 1100px)"),
};

// ---- panels: docked beside the conversation where there is room, else over it with everything else out of reach -----

let opener = null; // what gets the focus back

function openPanel(name, from = null) {
  if (name !== "sidebar") for (const other of ["controls", "experts"]) if (other !== name) closePanel(other, false);
  $(name).hidden = false;
  $(name).classList.add("open");
  opener = from ?? opener;
  layOut();
  if (!DOCKED[name].matches || from) $(name).querySelector("button, input, select")?.focus({ preventScroll: true });
}

function closePanel(name, giveFocus = true) {
  const had = $(name).contains(document.activeElement);
  $(name).classList.remove("open");
  $(name).hidden = true;
  layOut();
  if (giveFocus && had) (opener?.isConnected ? opener : $("input")).focus({ preventScroll: true });
}

const isOpen = (name) => !$(name).hidden;
const floating = () => ["experts", "controls", "sidebar"].find((name) => isOpen(name) && !DOCKED[name].matches);

function layOut() {
  const over = floating();
  $("backdrop").hidden = !over;
  for (const part of ["sidebar", "main", "controls", "experts"]) $(part).inert = Boolean(over) && part !== over;
  for (const name of ["sidebar", "controls"]) $(`${name}-toggle`).setAttribute("aria-expanded", String(isOpen(name)));
}

function setUpPanels() {
  if (!DOCKED.sidebar.matches) closePanel("sidebar", false);
  for (const query of Object.values(DOCKED))
    query.addEventListener("change", () => {
      if (isOpen("sidebar") !== DOCKED.sidebar.matches)
        DOCKED.sidebar.matches ? openPanel("sidebar") : closePanel("sidebar", false);
      layOut();
    });
  for (const name of ["sidebar", "controls"])
    $(`${name}-toggle`).addEventListener("click", (event) =>
      isOpen(name) ? closePanel(name) : openPanel(name, event.currentTarget),
    );
  $("sidebar-close").addEventListener("click", () => closePanel("sidebar"));
  for (const button of document.querySelectorAll("[data-close=controls], [data-close=experts]"))
    button.addEventListener("click", () => closePanel(button.dataset.close));
  $("backdrop").addEventListener("click", () => closePanel(floating()));
  layOut();
}

// ---- light and dark ------------------------------------------------------------------------------------------------

const THEMES = { auto: "The system’s colours", light: "Light", dark: "Dark" };

function setUpTheme() {
  const names = Object.keys(THEMES);
  const icons = { auto: "auto", light: "sun", dark: "moon" };
  const show = (theme) => {
    const label = `Colours: ${THEMES[theme].toLowerCase()}`;
    $("theme-toggle").title = label;
    $("theme-toggle").setAttribute("aria-label", label);
    $("theme-toggle").querySelector("use").setAttribute("href", `#icon-${icons[theme]}`);
  };
  const current = () => document.documentElement.dataset.theme ?? "auto";
  $("theme-toggle").addEventListener("click", () => {
    const next = names[(names.indexOf(current()) + 1) % names.length];
    if (next === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = next;
    try {
      localStorage.setItem("minimax-m1/theme", next);
    } catch {
      // it holds until the page is left
    }
    show(next);
  });
  show(current());
}

// ---- what is served ------------------------------------------------------------------------------------------------

function showFacts(info) {
  const lightning = info.layers.filter(({ kind }) => kind === "lightning").length;
  const facts = {
    Parameters: `${compact(info.parameters)}, ${compact(info.active_parameters)} per token`,
    Layers: `${lightning} lightning, ${info.layers.length - lightning} softmax`,
    Experts: `${info.experts_per_token} of ${info.num_experts} per token`,
    Context: `${whole(info.max_model_len)} tokens`,
  };
  $("facts").replaceChildren(
    ...Object.entries(facts).map(([name, text]) => el("div", {}, el("dt", {}, name), el("dd", {}, text))),
  );
  $("model-name").textContent = info.model;
  document.title = `${info.model} · MiniMax-M1 playground`;
}

function showWelcome(info, ask, onKey) {
  const about = info.abilities
    ? `A very small model, with ${plural(info.parameters, "parameter")}, that can ${info.abilities}. ` +
      "It thinks first, then answers; anything else it declines."
    : `${compact(info.parameters)} parameters, ${whole(info.max_model_len)} tokens of context. ` +
      "It thinks first, then answers.";
  const examples = info.examples.map((text) => {
    const button = el("button", { type: "button", class: "example" }, el("span", {}, text), icon("send"));
    button.addEventListener("click", () => ask(text));
    return button;
  });
  const name = el("span", { class: "nowrap" }, info.model);
  const title = info.abilities
    ? el("h2", {}, "What should ", name, " work out?")
    : el("h2", {}, "What would you like to know?");
  const parts = [title, el("p", { class: "about" }, about)];
  if (info.needs_key && !apiKey.get()) parts.push(keyForm(onKey));
  parts.push(el("div", { class: "examples", role: "group", "aria-label": "Examples" }, ...examples));
  parts.push(
    el(
      "p",
      { class: "small" },
      "Under every answer, ",
      el("strong", {}, "Experts"),
      " shows which experts of the model worked on it, token by token.",
    ),
  );
  $("welcome").replaceChildren(...parts);
}

function keyForm(onKey) {
  const input = el("input", {
    type: "password",
    placeholder: "API key",
    "aria-label": "API key",
    autocomplete: "off",
    required: true,
  });
  const form = el("form", { class: "key-form" }, input, el("button", { class: "button primary" }, "Use this key"));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    apiKey.set(input.value.trim());
    form.remove();
    onKey();
  });
  return form;
}

// ---- the list of conversations -------------------------------------------------------------------------------------

function setUpConversations(chat) {
  const open = (id) => {
    chat.open(id);
    if (DOCKED.sidebar.matches) $("input").focus();
    else closePanel("sidebar", false); // without focus, which would bring up a phone's keyboard
  };
  $("new-conversation").addEventListener("click", () => open(null));
  $("delete-all").addEventListener("click", () => {
    if (!listConversations().length || !confirm("Delete all conversations in this browser?")) return;
    chat.open(null);
    deleteAll();
    chat.onChange();
  });
  $("conversations").addEventListener("click", (event) => {
    const item = event.target.closest("li");
    if (!item) return;
    const { id } = item.dataset;
    if (!event.target.closest("[data-action=delete]")) return open(id);
    if (id === chat.conversation.id) chat.open(null);
    deleteConversation(id);
    chat.onChange();
    $("new-conversation").focus();
  });
  window.addEventListener("storage", () => listInto(chat));
}

function listInto(chat) {
  const items = listConversations().map(({ id, title }) => {
    const isHere = id === chat.conversation.id;
    const name = el(
      "button",
      { type: "button", class: "conversation", "aria-current": isHere ? "true" : null },
      title || "Untitled",
    );
    return el("li", { data: { id } }, name, iconButton("trash", `Delete “${title}”`, { action: "delete" }));
  });
  $("conversations").replaceChildren(...items);
}

// ---- the composer and the keys -------------------------------------------------------------------------------------

function setUpComposer(chat) {
  const input = $("input");
  const fit = () => {
    input.style.height = "auto";
    input.style.height = `${input.scrollHeight}px`;
    $("send").disabled = !input.value.trim();
  };
  const submit = () => {
    if (!chat.send(input.value)) return;
    input.value = "";
    fit();
  };
  input.addEventListener("input", fit);
  input.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    submit();
  });
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  $("composer").addEventListener("click", (event) => event.target === $("composer") && input.focus());
  $("stop").addEventListener("click", () => {
    chat.stop();
    input.focus();
  });
  fit();
}

function setUpKeys(chat) {
  document.addEventListener("keydown", (event) => {
    if (event.defaultPrevented || event.isComposing || $("usage").open) return;
    if (event.key === "Escape") {
      const over = floating();
      if (over) closePanel(over);
      else if (chat.isRunning) chat.stop();
      else if (isOpen("experts")) closePanel("experts");
    } else if (event.key === "/" && !event.ctrlKey && !event.metaKey && !event.altKey) {
      if (event.target.closest("input, textarea, select") || floating()) return;
      event.preventDefault();
      $("input").focus();
    }
  });
}

// ---- together ------------------------------------------------------------------------------------------------------

async function start() {
  setUpTheme();
  setUpPanels();
  let info;
  try {
    info = await (await request("playground/info")).json();
  } catch (error) {
    const again = el("button", { type: "button", class: "button" }, "Try again");
    again.addEventListener("click", () => location.reload());
    $("welcome").hidden = false;
    $("welcome").replaceChildren(
      el("h2", {}, "No answer from the server"),
      el("p", { class: "about" }, error.message),
      again,
    );
    return;
  }
  showFacts(info);

  let chat = null;
  const settings = new Settings($("settings"), info, () => chat && showSummary());
  const experts = new ExpertsView($("experts-body"), info);
  const showSummary = () =>
    $("chips").replaceChildren(...settings.summary.map((text) => el("span", { class: "chip-setting" }, text)));

  chat = new Chat({
    turns: $("turns"),
    scroller: $("scroller"),
    jump: $("jump"),
    announcer: $("announcer"),
    info,
    settings,
    onChange: () => {
      $("welcome").hidden = !chat.isEmpty;
      $("send").hidden = chat.isRunning;
      $("stop").hidden = !chat.isRunning;
      const used = chat.contextTokens;
      $("context").hidden = used === null;
      $("context-text").textContent = `${whole(used ?? 0)} of ${plural(info.max_model_len, "token")}`;
      $("context-meter").value = (used ?? 0) / info.max_model_len;
      if (chat.isEmpty) closePanel("experts", false);
      openHere(chat.conversation.id);
      listInto(chat);
    },
    onExperts: (message, question, button) => {
      experts.show(message.routing, question);
      openPanel("experts", button);
    },
    onDone: (message, question) => {
      if (message.routing && isOpen("experts")) experts.show(message.routing, question);
    },
    onKey: () => settings.showKey(),
    onProblem: ({ field }) => {
      openPanel("controls");
      document.querySelector(`[data-field=${field}] :is(textarea, input)`).focus();
    },
  });

  showWelcome(
    info,
    (text) => chat.send(text),
    () => settings.showKey(),
  );
  setUpConversations(chat);
  setUpComposer(chat);
  setUpKeys(chat);
  $("reset").addEventListener("click", () => settings.reset());
  $("usage-open").addEventListener("click", () => {
    $("usage").showModal();
    showUsage($("usage-body"));
  });
  $("usage").addEventListener("click", (event) => {
    if (event.target === $("usage") || event.target.closest("[data-close]")) $("usage").close();
  });
  showSummary();
  chat.open(openHere());
  document.documentElement.dataset.ready = "true";
  if (DOCKED.sidebar.matches) $("input").focus(); // on a phone, this would bring up the keyboard
}

start();
