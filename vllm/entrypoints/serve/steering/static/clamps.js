// SPDX-License-Identifier: Apache-2.0
// The clamped features: a slider in multiples of the feature's own maximum, and a kind.

import { el, number, showError } from "./dom.js";

const START = 1.25;
const KINDS = {
  absolute: "hold at",
  additive: "add",
  scale: "multiply by",
};

export class Clamps {
  /** `facts(index)`: `{label, max}`; `changed`: called after every change. */
  constructor(list, facts, changed) {
    this.list = list;
    this.facts = facts;
    this.changed = changed;
    this.items = [];
  }

  get features() {
    return this.items.map((item) => item.feature);
  }

  add(feature) {
    if (this.features.includes(feature)) return;
    const item = { feature, kind: "absolute", times: START, onlyIfActive: false };
    this.#render(item);
    this.items.push(item);
    this.list.append(item.root);
    this.changed();
    item.slider.focus();
  }

  clear() {
    this.items = [];
    this.list.replaceChildren();
    this.changed();
  }

  /** The entries of a spec. */
  entries() {
    return this.items.map((item) => ({
      feature_idx: item.feature,
      kind: item.kind,
      value: this.#value(item),
      only_if_active: item.onlyIfActive,
    }));
  }

  /** The entry with `feature` held at `times` its maximum, alone; for sweeps. */
  held(feature, times) {
    const value = round(times * this.facts(feature).max);
    return [{ feature_idx: feature, kind: "absolute", value }];
  }

  /** Show the server's error at the entry `index`; false when there is none. */
  blame(index, message) {
    const item = this.items[index];
    if (!item) return false;
    showError(item.error, message, item.slider);
    return true;
  }

  forgive() {
    this.items.forEach((item) => showError(item.error, "", item.slider));
  }

  /** Labels or maxima have come. */
  refresh() {
    this.items.forEach((item) => this.#show(item));
  }

  #value(item) {
    return item.kind === "scale" ? item.times : round(item.times * this.facts(item.feature).max);
  }

  #render(item) {
    const id = `clamp-${item.feature}`;
    item.name = el("label", { htmlFor: id });
    item.output = el("output", { htmlFor: id });
    item.error = el("p", { className: "error", role: "alert", id: `${id}-error`, hidden: true });
    const set = (change) => (event) => {
      change(event.target);
      this.#show(item);
      this.changed();
    };
    item.slider = el("input", {
      type: "range", id, min: 0, max: 3, step: 0.05, value: item.times,
      oninput: set((target) => { item.times = Number(target.value); }),
    });
    const kind = el("select", {
      "aria-label": `How feature ${item.feature} is clamped`,
      onchange: set((target) => { item.kind = target.value; }),
    }, ...Object.entries(KINDS).map(([value, text]) => el("option", { value }, text)));
    const condition = el("label", {}, el("input", {
      type: "checkbox",
      onchange: set((target) => { item.onlyIfActive = target.checked; }),
    }), " only where it is active");
    const remove = el("button", {
      type: "button", "aria-label": `Remove feature ${item.feature}`,
      onclick: () => this.#remove(item),
    }, "Remove");
    item.root = el(
      "li", {}, el("div", { className: "title" }, item.name, remove), item.slider,
      el("div", { className: "row" }, kind, item.output, condition), item.error);
    this.#show(item);
  }

  #show(item) {
    const { label, max, known } = this.facts(item.feature);
    item.name.textContent = label;
    const value = number(this.#value(item));
    item.output.textContent = item.kind === "scale"
      ? `× ${value}`
      : `${number(item.times)} × ${known ? "its maximum" : "the strongest seen here"} = ${value}`;
    item.slider.setAttribute("aria-valuetext", item.output.textContent);
    if (item.times !== Number(item.slider.value)) item.slider.value = item.times;
    item.slider.dataset.max = max;
  }

  #remove(item) {
    this.items = this.items.filter((other) => other !== item);
    item.root.remove();
    this.changed();
    (this.items[0]?.slider ?? document.getElementById("label-query")).focus();
  }
}

const round = (value) => Number(value.toPrecision(6));
