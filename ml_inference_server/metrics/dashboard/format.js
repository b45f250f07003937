// Numbers as people read them, and the few ways in which text gets into the page. Never as markup.

export const NOTHING = "–";

export const byId = (id) => document.getElementById(id);
export const pick = (tree, path) => path.split(".").reduce((value, key) => value?.[key], tree) ?? null;

const decimals = (value) => (Math.abs(value) >= 100 || Number.isInteger(value) ? 0 : Math.abs(value) >= 10 ? 1 : 2);

export function number(value, digits) {
  if (value === null || value === undefined) return NOTHING;
  const places = digits ?? decimals(value);
  return value.toLocaleString("en-US", { minimumFractionDigits: places, maximumFractionDigits: places });
}

const COMPACT = new Intl.NumberFormat("en-US", { notation: "compact", maximumSignificantDigits: 3 });

export const compact = (value) => COMPACT.format(value);

export const percent = (share, digits = 1) => number(share === null ? null : share * 100, digits);

export function bytes(value) {
  if (value === null) return NOTHING;
  const gib = value / 2 ** 30;
  return gib >= 1 ? `${number(gib, 2)} GiB` : `${number(value / 2 ** 20, 0)} MiB`;
}

export function duration(seconds) {
  const s = Math.floor(seconds);
  const [d, h, m] = [Math.floor(s / 86400), Math.floor(s / 3600) % 24, Math.floor(s / 60) % 60];
  if (d) return `${d} d ${h} h`;
  if (h) return `${h} h ${m} min`;
  return m ? `${m} min ${s % 60} s` : `${s} s`;
}

export const count = (amount, one, many) => `${number(amount)} ${amount === 1 ? one : many}`;

export const words = (constant) => constant.toLowerCase().replaceAll("_", " ");

export function setText(target, text) {
  if (target.textContent !== text) target.textContent = text;
}

export function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

// Gives `parent` one child for each item: `make` builds a child once, `fill` writes into it each time.
export function children(parent, items, make, fill) {
  while (parent.children.length > items.length) parent.lastElementChild.remove();
  items.forEach((item, index) => {
    const child = parent.children[index] ?? parent.appendChild(make(item));
    fill(child, item);
  });
}
