// SPDX-License-Identifier: Apache-2.0
// The steering vectors: a scale and the tokens for each vector module.

import { el, showError } from "./dom.js";
import { SpanControl } from "./spans.js";

export class Vectors {
  constructor(list) {
    this.list = list;
    this.items = [];
  }

  /** Show the modules `names`, each at scale 1. */
  show(names) {
    this.items = names.map((name) => this.#render(name));
    this.list.replaceChildren(...this.items.map((item) => item.root));
  }

  /** `[{name, scale, where}]`. */
  entries() {
    return this.items.map(({ name, slider, span }) => (
      { name, scale: Number(slider.value), where: span.fields }));
  }

  /** Show the server's error at the vector `index`; false when there is none. */
  blame(index, field, message) {
    const item = this.items[index];
    if (!item) return false;
    item.blamed = /^(spans|phase)/.test(field) ? item.span.control : item.slider;
    showError(item.error, message, item.blamed);
    return true;
  }

  forgive() {
    this.items.forEach((item) => showError(item.error, "", item.blamed ?? item.slider));
  }

  #render(name) {
    const output = el("output", {}, "1");
    const slider = el("input", {
      type: "range", min: -10, max: 10, step: 0.25, value: 1,
      oninput: ({ target }) => { output.textContent = target.value; },
    });
    const span = new SpanControl(`vector ${name}`, () => {});
    const error = el("p", {
      className: "error", role: "alert", id: `vector-${name}-error`, hidden: true });
    const root = el(
      "li", {}, el("label", {}, `${name} `, slider), "× ", output,
      el("div", { className: "row" }, span.root), error);
    return { name, slider, span, error, root };
  }
}
