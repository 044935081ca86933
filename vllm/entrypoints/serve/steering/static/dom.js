// SPDX-License-Identifier: Apache-2.0
// Small helpers. Text from the server is only ever set as text, never as HTML.

export const $ = (id) => document.getElementById(id);

/** An HTML element with properties, attributes, listeners (`on…`) and children. */
export function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name in element && !name.includes("-")) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

/** An SVG element with attributes and children. */
export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** Show an error beside a control, or clear it. */
export function showError(place, message, control) {
  place.textContent = message || "";
  place.hidden = !message;
  if (control) {
    control.setAttribute("aria-invalid", message ? "true" : "false");
    if (place.id) control.setAttribute("aria-describedby", place.id);
  }
}

export function options(select, entries, chosen) {
  select.replaceChildren(
    ...entries.map(([value, text]) => el("option", { value, selected: value === chosen }, text)));
}

export const number = (value, digits = 3) =>
  Number(value).toLocaleString("en", { maximumSignificantDigits: digits });
