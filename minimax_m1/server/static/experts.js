// Which experts an answer went to: a heatmap of layers and experts, and the answer token by token.
//
// A routing log is {num_tokens, num_experts, layers: [{layer, experts, counts, mean_weights, load_balance_entropy}],
// tokens: [{text, experts: [[ids, the most probable first] of each layer]}]}.

import { el, icon, percent, plural, whole } from "./dom.js";

const PAGE = 2000; // tokens shown at once
const MOST_LABELLED = 12; // experts whose cells have room for a figure

export class ExpertsView {
  constructor(body, info) {
    this.body = body;
    this.info = info;
    this.metric = "share"; // or weight
    this.layer = 0; // by whose experts the tokens are coloured
    this.expert = null; // of that layer; its tokens stand out
    this.tip = el("div", { class: "tip", role: "tooltip", hidden: true });
  }

  /** Show the routing log of the answer to a question. */
  show(routing, question) {
    this.routing = routing;
    this.question = question;
    this.kinds = this.info.layers.map(({ kind }) => kind);
    const balances = routing.layers.map((layer) => layer.load_balance_entropy);
    this.layer = balances.indexOf(Math.max(...balances)); // the most colourful
    this.expert = null;
    this.cells = []; // [layer][expert]
    this.lit = []; // cells that the token under the pointer went through
    this.token = null; // the one that was chosen
    this.shown = 0; // tokens on the page
    this.body.replaceChildren(this.#intro(), this.#heatmap(), this.#tokens(), this.tip);
    this.#paintCells();
    this.#paintTokens();
  }

  // ---- the heatmap -------------------------------------------------------------------------------------------------

  #intro() {
    const { num_tokens, num_experts, layers } = this.routing;
    const choose = (metric, text) => {
      const input = el("input", { type: "radio", name: "metric", value: metric, checked: this.metric === metric });
      input.addEventListener("change", () => {
        this.metric = metric;
        this.#paintCells();
      });
      return el("label", {}, input, el("span", {}, text));
    };
    const each = `${this.info.experts_per_token} of ${num_experts} experts`;
    const text =
      `${plural(num_tokens, "token")} of prompt and answer ran through ${plural(layers.length, "layer")}, ` +
      `each token through ${each} in every layer. What came from the prompt cache is not counted.`;
    return el(
      "div",
      { class: "experts-intro" },
      el("div", {}, el("p", { class: "experts-question" }, this.question), el("p", { class: "help" }, text)),
      el(
        "div",
        { class: "segments", role: "radiogroup", "aria-label": "What the cells show" },
        choose("share", "Share of tokens"),
        choose("weight", "Mean weight"),
      ),
    );
  }

  #heatmap() {
    const { num_experts: E, layers } = this.routing;
    const head = el("tr", { role: "row" }, el("th", { class: "corner", scope: "col" }, "Layer"));
    for (let e = 0; e < E; e++)
      head.append(
        el(
          "th",
          { scope: "col", role: "columnheader" },
          el("span", { class: "visually-hidden" }, "Expert "),
          String(e),
        ),
      );
    head.append(
      el(
        "th",
        {
          scope: "col",
          class: "balance",
          title:
            "Load-balance entropy: 1 when all experts of the layer are used alike, 0 when it is always the same one",
        },
        "Balance",
      ),
    );
    const rows = el("tbody");
    for (const [i, layer] of layers.entries()) rows.append(this.#heatmapRow(layer, i, E));
    const table = el(
      "table",
      { class: `heat${E > MOST_LABELLED ? " dense" : ""}`, role: "grid", "aria-label": "Use of experts by layer" },
      el("thead", {}, head),
      rows,
    );
    table.addEventListener("click", (event) => this.#onCell(event));
    table.addEventListener("keydown", (event) => this.#onGridKey(event));
    table.addEventListener("focusin", (event) => this.#showTip(event.target));
    table.addEventListener("pointerover", (event) => this.#showTip(event.target.closest("td")));
    for (const leave of ["focusout", "pointerleave"]) table.addEventListener(leave, () => (this.tip.hidden = true));
    this.cells[0][0].tabIndex = 0;
    this.legend = el("div", { class: "legend" });
    const scroll = el("div", { class: "heat-scroll" }, table);
    scroll.addEventListener("scroll", () => (this.tip.hidden = true), { passive: true });
    return el("section", { class: "heat-section", "aria-label": "Heatmap" }, scroll, this.legend);
  }

  #heatmapRow(layer, i, E) {
    const kind = this.kinds[i];
    const row = el(
      "tr",
      { role: "row" },
      el(
        "th",
        { scope: "row", role: "rowheader", title: `Layer ${i}: ${kind} attention`, class: kind },
        el("span", { class: "number" }, String(i)),
        icon(kind === "lightning" ? "bolt" : "focus"),
        el("span", { class: "visually-hidden" }, ` ${kind}`),
      ),
    );
    const counts = new Array(E).fill(0);
    const weights = new Array(E).fill(0);
    layer.experts.forEach((expert, k) => {
      counts[expert] = layer.counts[k];
      weights[expert] = layer.mean_weights[k];
    });
    this.cells.push([]);
    for (let e = 0; e < E; e++) {
      const cell = el(
        "td",
        {
          role: "gridcell",
          tabindex: "-1",
          class: "cell",
          "aria-selected": "false",
          data: { layer: i, expert: e, count: counts[e], weight: weights[e] },
        },
        el("span", {}),
      );
      this.cells[i].push(cell);
      row.append(cell);
    }
    const entropy = layer.load_balance_entropy;
    const bar = el("span", { class: "bar", "aria-hidden": "true" });
    bar.style.setProperty("--v", entropy);
    row.append(el("td", { role: "gridcell", class: "balance" }, bar, el("span", {}, entropy.toFixed(2))));
    return row;
  }

  /** Colour all cells by the chosen figure, and write it where there is room. */
  #paintCells() {
    const { num_tokens, num_experts } = this.routing;
    const isShare = this.metric === "share";
    const valueOf = ({ dataset }) =>
      isShare ? Number(dataset.count) / Math.max(1, num_tokens) : Number(dataset.weight);
    const all = this.cells.flat();
    const most = Math.max(1e-9, ...all.map(valueOf));
    for (const cell of all) {
      const value = valueOf(cell);
      const t = value / most;
      cell.style.setProperty("--t", t.toFixed(4));
      cell.classList.toggle("warm", t > 0.3); // the colour of the text follows: see the style sheet
      cell.classList.toggle("mid", t > 0.51);
      cell.classList.toggle("high", t > 0.7);
      cell.classList.toggle("none", value === 0);
      cell.firstChild.textContent = isShare ? percent(value) : value.toFixed(2);
      cell.setAttribute("aria-label", this.#describe(cell));
    }
    const even = this.info.experts_per_token / num_experts;
    const scale = el("span", { class: "scale", "aria-hidden": "true" });
    const parts = [el("span", {}, "0"), scale, el("span", {}, isShare ? percent(most) : most.toFixed(2))];
    if (isShare) parts.push(el("span", { class: "small" }, `Even use would be ${percent(even)} everywhere.`));
    if (isShare && even <= most) {
      const mark = el("i", { title: `even use, ${percent(even)}` });
      mark.style.setProperty("--at", even / most);
      scale.append(mark);
    }
    const key = (kind, name) => el("span", { class: `kind ${kind}` }, icon(name), kind);
    this.legend.replaceChildren(
      el("div", { class: "scale-row" }, ...parts),
      el("div", { class: "kinds" }, key("lightning", "bolt"), key("softmax", "focus")),
    );
  }

  #describe({ dataset }) {
    const { layer, expert, count, weight } = dataset;
    const share = percent(Number(count) / Math.max(1, this.routing.num_tokens));
    if (count === "0") return `Layer ${layer}, expert ${expert}: not used`;
    const tokens = `${plural(Number(count), "token")}, ${share}`;
    return `Layer ${layer}, expert ${expert}: ${tokens}, mean weight ${Number(weight).toFixed(2)}`;
  }

  #showTip(cell) {
    this.tip.hidden = !cell?.classList.contains("cell");
    if (this.tip.hidden) return;
    this.tip.textContent = this.#describe(cell);
    const box = cell.getBoundingClientRect();
    const width = this.tip.offsetWidth;
    this.tip.style.left = `${Math.max(8, Math.min(innerWidth - width - 8, box.left + box.width / 2 - width / 2))}px`;
    const above = box.top - this.tip.offsetHeight - 6;
    this.tip.style.top = `${above < 8 ? box.bottom + 6 : above}px`;
  }

  #onCell(event) {
    const cell = event.target.closest("td.cell");
    const header = event.target.closest("th[scope=row]");
    if (cell) this.#choose(Number(cell.dataset.layer), Number(cell.dataset.expert));
    else if (header) this.#choose([...header.closest("tbody").rows].indexOf(header.parentElement), null);
  }

  #onGridKey(event) {
    const cell = event.target.closest("td.cell");
    if (!cell) return;
    const [layer, expert] = [Number(cell.dataset.layer), Number(cell.dataset.expert)];
    const last = this.cells[0].length - 1;
    const moves = {
      ArrowUp: [layer - 1, expert],
      ArrowDown: [layer + 1, expert],
      ArrowLeft: [layer, expert - 1],
      ArrowRight: [layer, expert + 1],
      Home: [layer, 0],
      End: [layer, last],
    };
    if (event.key === "Enter" || event.key === " ") this.#choose(layer, expert);
    else if (event.key in moves) {
      const next = this.cells[moves[event.key][0]]?.[moves[event.key][1]];
      if (next) {
        cell.tabIndex = -1;
        next.tabIndex = 0;
        next.focus();
      }
    } else return;
    event.preventDefault();
  }

  /** Choose a layer for the colours and one of its experts, or none; the chosen one again: none. */
  #choose(layer, expert) {
    this.expert = layer === this.layer && expert === this.expert ? null : expert;
    this.layer = layer;
    for (const cell of this.body.querySelectorAll(".cell.chosen")) {
      cell.classList.remove("chosen");
      cell.setAttribute("aria-selected", "false");
    }
    if (this.expert !== null) {
      const cell = this.cells[this.layer][this.expert];
      cell.classList.add("chosen");
      cell.setAttribute("aria-selected", "true");
    }
    this.#paintTokens();
  }

  // ---- token by token ----------------------------------------------------------------------------------------------

  #tokens() {
    const { tokens, layers } = this.routing;
    if (!tokens?.length) {
      const text = tokens
        ? "The answer is too short for a view of its tokens."
        : "The routes of single tokens were not kept: the browser’s storage is full.";
      return el(
        "section",
        { class: "token-section" },
        el("h3", {}, "Token by token"),
        el("p", { class: "help" }, text),
      );
    }
    this.select = el(
      "select",
      { "aria-label": "Layer whose experts colour the tokens" },
      ...layers.map((_, i) => el("option", { value: i }, `Layer ${i}, ${this.kinds[i]}`)),
    );
    this.select.addEventListener("change", () => this.#choose(Number(this.select.value), null));
    this.swatches = el("div", { class: "swatches", role: "group", "aria-label": "Experts of this layer" });
    this.swatches.addEventListener("click", (event) => {
      const swatch = event.target.closest("button");
      if (swatch) this.#choose(this.layer, Number(swatch.dataset.expert));
    });
    this.detail = el("div", {
      class: `detail${layers.length > 8 ? " long" : ""}`,
      tabindex: "-1",
      "aria-live": "polite",
    });
    this.list = el("div", {
      class: "tokens",
      role: "listbox",
      tabindex: "0",
      "aria-label": "Tokens of the answer; arrow keys choose one",
    });
    this.list.addEventListener("pointerover", (event) => this.#look(event.target.closest(".token")));
    this.list.addEventListener("pointerleave", () => this.#look(this.token));
    this.list.addEventListener("click", (event) => this.#pick(event.target.closest(".token")));
    this.list.addEventListener("keydown", (event) => this.#onListKey(event));
    this.list.addEventListener("focus", () => {
      if (!this.token && this.list.matches(":focus-visible")) this.#pick(this.list.firstElementChild); // by key
    });
    this.more = el("button", { type: "button", class: "button" });
    this.more.addEventListener("click", () => this.#showMore());
    const head = el("div", { class: "token-head" }, el("h3", {}, "Token by token"), this.select);
    const section = el(
      "section",
      { class: "token-section", "aria-label": "Token by token" },
      head,
      this.swatches,
      this.detail,
      this.list,
      this.more,
    );
    this.#showMore();
    this.#describeToken(null);
    return section;
  }

  #showMore() {
    const { tokens } = this.routing;
    const end = Math.min(tokens.length, this.shown + PAGE);
    const fragment = document.createDocumentFragment();
    for (let i = this.shown; i < end; i++) {
      const { text } = tokens[i];
      const token = el(
        "span",
        { class: "token", role: "option", id: `token-${i}`, "aria-selected": "false", data: { i } },
        shownText(text),
      );
      fragment.append(token);
      if (text.includes("\n")) fragment.append(el("br"));
    }
    this.list.append(fragment);
    this.shown = end;
    const left = tokens.length - end;
    this.more.hidden = left === 0;
    this.more.textContent = `Show ${whole(Math.min(left, PAGE))} more of ${whole(tokens.length)}`;
    if (end > PAGE) this.#paintTokens();
  }

  /** Colour the tokens by their first expert in the layer; let those of the chosen expert stand out. */
  #paintTokens() {
    const { tokens, num_experts } = this.routing;
    if (!tokens?.length) return;
    this.select.value = String(this.layer);
    this.list.classList.toggle("filtering", this.expert !== null);
    const used = new Array(num_experts).fill(0);
    for (const { experts } of tokens) for (const expert of experts[this.layer]) if (expert >= 0) used[expert]++;
    for (const token of this.list.querySelectorAll(".token")) {
      const experts = tokens[Number(token.dataset.i)].experts[this.layer];
      tint(token, experts[0]);
      token.classList.toggle("match", this.expert !== null && experts.includes(this.expert));
    }
    const buttons = used.map((count, expert) => {
      const name = `Expert ${expert}: ${plural(count, "token")} of the answer`;
      const button = el(
        "button",
        {
          type: "button",
          class: "swatch",
          data: { expert },
          title: name,
          "aria-label": name,
          "aria-pressed": String(expert === this.expert),
          disabled: count === 0,
        },
        String(expert),
      );
      tint(button, expert);
      return button;
    });
    const focused = this.swatches.contains(document.activeElement) ? document.activeElement.dataset.expert : null;
    this.swatches.replaceChildren(...buttons);
    if (focused !== null) buttons[focused].focus();
    if (!this.token) this.#describeToken(null);
  }

  /** Show where a token went: in the heatmap and in words. */
  #look(token) {
    for (const cell of this.lit) cell.classList.remove("lit");
    this.lit = [];
    if (token) {
      const { experts } = this.routing.tokens[Number(token.dataset.i)];
      this.lit = experts.flatMap((ids, layer) => ids.filter((id) => id >= 0).map((id) => this.cells[layer][id]));
      for (const cell of this.lit) cell.classList.add("lit");
    }
    this.#describeToken(token);
  }

  #pick(token) {
    if (!token) return;
    this.token?.classList.remove("picked");
    this.token?.setAttribute("aria-selected", "false");
    this.token = token === this.token ? null : token;
    this.token?.classList.add("picked");
    this.token?.setAttribute("aria-selected", "true");
    if (this.token) this.list.setAttribute("aria-activedescendant", token.id);
    else this.list.removeAttribute("aria-activedescendant");
    this.#look(this.token);
  }

  #onListKey(event) {
    const all = this.list.getElementsByClassName("token");
    const at = this.token ? Number(this.token.dataset.i) : 0;
    const moves = {
      ArrowRight: at + 1,
      ArrowDown: at + 1,
      ArrowLeft: at - 1,
      ArrowUp: at - 1,
      Home: 0,
      End: all.length - 1,
    };
    if (!(event.key in moves)) return;
    event.preventDefault();
    const next = all[moves[event.key]];
    if (next && next !== this.token) this.#pick(next);
    next?.scrollIntoView({ block: "nearest" });
  }

  #describeToken(token) {
    if (!token) {
      const { tokens } = this.routing;
      const users =
        this.expert === null ? null : tokens.filter(({ experts }) => experts[this.layer].includes(this.expert)).length;
      const text =
        users === null
          ? "The colour is the first expert of the layer. Point at a token, or choose one, to see its way through " +
            "all layers; choose an expert to see its tokens."
          : `Expert ${this.expert} of layer ${this.layer} worked on ${whole(users)} of ` +
            `${plural(tokens.length, "token")} of the answer.`;
      this.detail.replaceChildren(el("p", { class: "help" }, text));
      return;
    }
    const i = Number(token.dataset.i);
    const { text, experts } = this.routing.tokens[i];
    const routes = experts.map((ids, layer) => {
      const chips = ids
        .filter((id) => id >= 0)
        .map((id) => {
          const chip = el("span", { class: "chip" }, String(id));
          tint(chip, id);
          return chip;
        });
      return el(
        "li",
        { class: layer === this.layer ? "here" : null },
        el("span", { class: "small" }, `Layer ${layer}`),
        el("span", { class: "visually-hidden" }, ": experts "),
        ...chips,
      );
    });
    this.detail.replaceChildren(
      el(
        "p",
        {},
        el("code", {}, JSON.stringify(text)),
        el("span", { class: "small" }, ` token ${whole(i + 1)} of ${whole(this.routing.tokens.length)}`),
      ),
      el("ul", { class: "routes" }, ...routes),
    );
  }
}

/** Give a node the colour of an expert: neighbours in number are far apart in hue. */
function tint(node, expert) {
  node.style.setProperty("--hue", ((expert * 137.508 + 30) % 360).toFixed(1));
  node.style.setProperty("--tone", String(Math.floor(expert / 8) % 3));
}

/** What a token looks like: line breaks get a sign, and a part of a character a dot. */
const shownText = (text) => (text === "" ? "·" : text.replaceAll("\n", "⏎"));
