// SPDX-License-Identifier: Apache-2.0
// The steering vectors: kind, strength and the tokens for each vector module.

import { el, showError } from "./dom.js";
import { SpanControl } from "./spans.js";

const KINDS = {
  add: "add, times",
  scale: "multiply the projection by",
  set: "set the projection to",
  bound: "keep the projection between",
};
// The slider's reach for kinds that have one: times the vector, of the stream's norm.
const REACH = { add: 10, relative: 1, scale: 2 };

class Vector {
  constructor(name) {
    this.name = name;
    const about = (text) => ({ "aria-label": `${text} of vector ${name}` });
    this.kind = el(
      "select", { ...about("Kind"), onchange: () => this.#show() },
      ...Object.entries(KINDS).map(([value, text]) => el("option", { value }, text)));
    this.output = el("output", {}, "1");
    this.slider = el("input", {
      type: "range", ...about("Strength"),
      oninput: () => { this.output.textContent = this.slider.value; },
    });
    const number = (text, value) => el("input", {
      type: "number", step: "any", value, ...about(text) });
    this.value = number("Projection", 0);
    this.low = number("Smallest projection", -1);
    this.high = number("Largest projection", 1);
    this.pair = el("span", {}, this.low, " and ", this.high);
    this.relative = el("input", { type: "checkbox", onchange: () => this.#show() });
    this.units = el("label", {}, this.relative, " times the stream’s norm");
    this.span = new SpanControl(`vector ${name}`, () => {});
    this.error = el("p", {
      className: "error", role: "alert", id: `vector-${name}-error`, hidden: true });
    this.root = el(
      "li", {}, el("div", { className: "title" }, name),
      el("div", { className: "row" }, this.kind, this.output, this.value, this.pair, this.units),
      this.slider, el("div", { className: "row" }, this.span.root), this.error);
    this.#show();
  }

  /** What the spec of the vector says beside its name and tokens. */
  get fields() {
    const kind = this.kind.value;
    const relative = this.relative.checked && kind !== "scale" ? { relative: true } : {};
    if (kind === "set") return { kind, value: Number(this.value.value), ...relative };
    if (kind === "bound") {
      return { kind, bounds: [Number(this.low.value), Number(this.high.value)], ...relative };
    }
    return { kind, scale: Number(this.slider.value), ...relative };
  }

  /** The control that an error about `field` belongs to. */
  control(field) {
    if (/^(spans|phase)/.test(field)) return this.span.control;
    if (/^kind/.test(field)) return this.kind;
    if (/^relative/.test(field)) return this.relative;
    const strength = { set: this.value, bound: this.low };
    return strength[this.kind.value] ?? this.slider;
  }

  /** Show the controls of the kind; a slider of another reach starts at its default. */
  #show() {
    const kind = this.kind.value;
    const slides = kind === "add" || kind === "scale";
    this.slider.hidden = this.output.hidden = !slides;
    this.value.hidden = kind !== "set";
    this.pair.hidden = kind !== "bound";
    this.units.hidden = kind === "scale";
    const reach = REACH[kind === "add" && this.relative.checked ? "relative" : kind];
    if (!slides || Number(this.slider.max) === reach) return;
    Object.assign(this.slider, { min: -reach, max: reach, step: reach / 40 });
    this.slider.value = { 1: 0.25, 2: 0, 10: 1 }[reach];
    this.output.textContent = this.slider.value;
  }
}

export class Vectors {
  constructor(list) {
    this.list = list;
    this.items = [];
  }

  /** Show the modules `names`, each added once. */
  show(names) {
    this.items = names.map((name) => new Vector(name));
    this.list.replaceChildren(...this.items.map((item) => item.root));
  }

  /** `[{name, edit, where}]`: the module, what it does, and the tokens. */
  entries() {
    return this.items.map(({ name, fields, span }) => (
      { name, edit: fields, where: span.fields }));
  }

  /** Show the server's error at the vector `index`; false when there is none. */
  blame(index, field, message) {
    const item = this.items[index];
    if (!item) return false;
    item.blamed = item.control(field);
    showError(item.error, message, item.blamed);
    return true;
  }

  forgive() {
    this.items.forEach((item) => showError(item.error, "", item.blamed ?? item.slider));
  }
}
