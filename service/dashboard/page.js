// What the dashboard's parts are written in: elements, tables, figures. Every text goes in as text, never as markup.

export const $ = (id) => document.getElementById(id);

/** An element with attributes and children; strings among them become text. */
export function el(name, attributes = {}, ...children) {
  const made = name.startsWith("svg:")
    ? document.createElementNS("http://www.w3.org/2000/svg", name.slice(4))
    : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) if (value !== undefined) made.setAttribute(key, value);
  made.append(...children.map((child) => (child instanceof Node ? child : String(child))));
  return made;
}

/** A figure in the unit that suits it; unknown is said, never zero. */
export function figure(value, unit) {
  if (value === null || value === undefined) return "unknown";
  if (value === 0) return `0 ${unit}`;
  const steps = [["k", 1e3], ["", 1], ["m", 1e-3], ["µ", 1e-6], ["n", 1e-9]];
  const [prefix, size] = steps.find(([, each]) => Math.abs(value) >= each * 0.9995) ?? steps.at(-1);
  const scaled = value / size;
  return `${scaled >= 1000 ? Math.round(scaled) : Number(scaled.toPrecision(3))} ${prefix}${unit}`;
}

export const percent = (share) => `${Math.round(share * 100)} %`;

export function table(headings, rows) {
  const side = (column) => (headings[column].endsWith(" ") ? "number" : undefined);
  return el("table", {},
    el("thead", {}, el("tr", {}, ...headings.map((text, i) => el("th", { scope: "col", class: side(i) }, text.trim())))),
    el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map((cell, i) => el("td", { class: side(i) }, cell))))));
}

/** Replace what an element shows only where it changes, so that a reader's selection and place survive. */
export function show(parent, ...children) {
  const next = parent.cloneNode(false);
  next.append(...children);
  if (!parent.isEqualNode(next)) parent.replaceChildren(...next.childNodes);
}

/** Named figures side by side, each with an optional note. */
export const tiles = (figures) => figures.map(([name, value, note]) =>
  el("div", {}, el("dt", {}, name), el("dd", {}, value, ...(note ? [el("small", {}, note)] : []))));
