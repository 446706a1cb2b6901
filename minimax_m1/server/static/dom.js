// Building nodes, and writing numbers. Text only ever becomes text: nothing here parses HTML.

/**
 * Make an element.
 * @param {string} tag
 * @param {Object} props `class`, `data` (an object), `on` (event -> listener); everything else is an attribute. null,
 *   undefined and false leave it out, true sets it empty.
 * @param {...(Node|string|null)} children null is skipped
 */
export function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "data") Object.assign(node.dataset, value);
    else if (name === "on")
      for (const [event, listener] of Object.entries(value)) node.addEventListener(event, listener);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/** Return one of the icons that index.html defines. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

/** Return a button with an icon and a name for those who do not see it. */
export function iconButton(name, label, data = {}) {
  return el("button", { type: "button", class: "icon-button", title: label, "aria-label": label, data }, icon(name));
}

/** Put a text on the clipboard; return whether it worked. On plain http, but for localhost, there is no API for it. */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = el("textarea", { class: "visually-hidden", readonly: true });
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}

/** Show on a button for a moment that it did its work. */
export function confirmOn(button, done) {
  const use = button.querySelector("use");
  const before = button.dataset.icon ?? use.getAttribute("href");
  button.dataset.icon = before;
  use.setAttribute("href", done ? "#icon-check" : "#icon-cross");
  clearTimeout(Number(button.dataset.timer));
  button.dataset.timer = setTimeout(() => use.setAttribute("href", before), 1500);
}

// ---- numbers -------------------------------------------------------------------------------------------------------

const WHOLE = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const COMPACT = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });

export const whole = (value) => WHOLE.format(value);
export const compact = (value) => COMPACT.format(value);
export const plural = (count, noun) => `${whole(count)} ${noun}${count === 1 ? "" : "s"}`;
export const percent = (share) =>
  `${share >= 0.0995 || share === 0 ? (100 * share).toFixed(0) : (100 * share).toFixed(1)}%`;

export function seconds(ms) {
  if (ms < 1000) return `${Math.round(ms)} ms`;
  if (ms < 60_000) return `${(ms / 1000).toFixed(1)} s`;
  return `${Math.floor(ms / 60_000)} min ${Math.floor((ms % 60_000) / 1000)} s`;
}

export function flops(value) {
  const units = ["", "K", "M", "G", "T", "P", "E", "Z"];
  let i = 0;
  for (; value >= 999.5 && i < units.length - 1; i++) value /= 1000;
  return `${value >= 100 ? value.toFixed(0) : Number(value.toPrecision(3))} ${units[i]}FLOP`;
}

/** Write an amount of money, however small, with two digits that say something. */
export function money(value, currency) {
  const digits = value === 0 ? 0 : value >= 1 ? 2 : Math.min(12, 1 - Math.floor(Math.log10(value)));
  try {
    const style = { style: "currency", currency, minimumFractionDigits: digits, maximumFractionDigits: digits };
    return new Intl.NumberFormat("en", style).format(value);
  } catch {
    return `${value.toFixed(digits)} ${currency}`; // not a currency that the browser knows
  }
}
