// What has been used: the server's own books (GET /v1/usage), as a table.

import { compact, el, flops, money, whole } from "./dom.js";
import { request } from "./stream.js";

const PERIODS = { day: "By day", hour: "By hour", key: "By key" };

/** Fill the dialog's body with the usage, by day at first. */
export async function showUsage(body, by = "day") {
  const select = el(
    "select",
    { "aria-label": "Rows" },
    ...Object.entries(PERIODS).map(([value, text]) => el("option", { value, selected: value === by }, text)),
  );
  select.addEventListener("change", () => showUsage(body, select.value));
  const place = el("div", { class: "usage", "aria-live": "polite" }, el("p", { class: "help" }, "Reading…"));
  const hadFocus = body.querySelector("select") === document.activeElement;
  body.replaceChildren(el("div", { class: "usage-head" }, select), place);
  if (hadFocus) select.focus();
  try {
    const { data, currency } = await (await request(`v1/usage?by=${by}`)).json();
    place.replaceChildren(
      data.length ? usageTable(data, currency, by) : el("p", { class: "help" }, "Nothing has been used yet."),
    );
  } catch (error) {
    const again = el("button", { type: "button", class: "button" }, "Try again");
    again.addEventListener("click", () => showUsage(body, by));
    const hint = error.status === 401 ? " Set it in the controls, under Access." : "";
    place.replaceChildren(el("div", { class: "error", role: "alert" }, el("p", {}, error.message + hint), again));
  }
}

function usageTable(rows, currency, by) {
  const names = [
    "requests",
    "prompt_tokens",
    "cached_tokens",
    "completion_tokens",
    "reasoning_tokens",
    "cost",
    "flops",
  ];
  const total = Object.fromEntries(names.map((name) => [name, rows.reduce((sum, row) => sum + (row[name] ?? 0), 0)]));
  const keys = new Set(rows.map((row) => row.key).filter(Boolean));
  const withKey = by !== "key" && keys.size > 1;
  const heads = [
    PERIODS[by].slice(3),
    ...(withKey ? ["key"] : []),
    "requests",
    "prompt",
    "cached",
    "written",
    "thinking",
    "cost",
    "FLOPs",
  ];
  const most = Math.max(1, ...rows.map((row) => row.prompt_tokens + row.completion_tokens));
  const line = (row, label, tag) => {
    const first = el(tag, { scope: tag === "th" ? "row" : null }, label);
    if (tag === "th" && row !== total) {
      const bar = el("span", { class: "usage-bar", "aria-hidden": "true" });
      bar.style.setProperty("--v", (row.prompt_tokens + row.completion_tokens) / most);
      first.append(bar);
    }
    const cells = names.map((name) => {
      const value = row[name] ?? 0;
      const text =
        name === "cost"
          ? money(value, currency)
          : name === "flops"
            ? flops(value)
            : value >= 1e7
              ? compact(value)
              : whole(value);
      return el("td", { title: whole(value) }, text);
    });
    return el("tr", {}, first, withKey ? el("td", { class: "left" }, row.key ?? "") : null, ...cells);
  };
  const table = el(
    "table",
    {},
    el("thead", {}, el("tr", {}, ...heads.map((head) => el("th", { scope: "col" }, head)))),
    el("tbody", {}, ...rows.map((row) => line(row, periodOf(row, by), "th"))),
    el("tfoot", {}, line(total, "all", "th")),
  );
  return el("div", { class: "table-scroll", tabindex: "0", role: "group", "aria-label": "Usage" }, table);
}

function periodOf(row, by) {
  const value = row[by] ?? row.period ?? "";
  return typeof value === "number"
    ? new Date(value * 1000)
        .toISOString()
        .slice(0, by === "hour" ? 16 : 10)
        .replace("T", " ")
    : String(value);
}
