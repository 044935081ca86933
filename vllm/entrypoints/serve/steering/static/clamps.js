// SPDX-License-Identifier: Apache-2.0
// The clamped features: strength in multiples of what is strong for the feature, kind,
// tokens and condition.

import { Condition } from "./conditions.js";
import { el, number, showError } from "./dom.js";
import { SpanControl } from "./spans.js";

const START = 1.25;
const KINDS = {
  absolute: "hold at",
  additive: "add",
  scale: "multiply by",
};

export class Clamps {
  /** `facts(index)`: `{label, unit, unitName}`; `changed`: called after every change. */
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
    const item = { feature, kind: "absolute", times: START };
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

  /** `[{entry, where}]`: an entry of a spec, and the tokens of the spec. */
  entries() {
    return this.items.map((item) => ({
      entry: {
        feature_idx: item.feature,
        kind: item.kind,
        value: this.#value(item),
        ...item.condition.fields,
      },
      where: item.span.fields,
    }));
  }

  /** `feature` held at `times` its unit, alone, everywhere; for sweeps. */
  held(feature, times) {
    const value = round(times * this.facts(feature).unit);
    return [{ entry: { feature_idx: feature, kind: "absolute", value }, where: {} }];
  }

  /**
   * Show the server's error at the clamp `index`, beside the control of `field`; false
   * when there is no such clamp.
   */
  blame(index, field, message) {
    const item = this.items[index];
    if (!item) return false;
    this.#forgive(item);
    let control = item.slider;
    if (/^when/.test(field)) control = item.condition.control(field);
    else if (/^(spans|phase)/.test(field)) control = item.span.control;
    else if (/^kind/.test(field)) control = item.kindSelect;
    item.blamed = control;
    showError(item.error, message, control);
    return true;
  }

  forgive() {
    this.items.forEach((item) => this.#forgive(item));
  }

  /** Labels or maxima have come. */
  refresh() {
    this.items.forEach((item) => this.#show(item));
  }

  #forgive(item) {
    showError(item.error, "", item.blamed ?? item.slider);
    item.blamed = null;
  }

  #value(item) {
    return item.kind === "scale" ? item.times : round(item.times * this.facts(item.feature).unit);
  }

  #render(item) {
    const id = `clamp-${item.feature}`;
    const { feature } = item;
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
    item.kindSelect = el("select", {
      "aria-label": `How feature ${feature} is clamped`,
      onchange: set((target) => { item.kind = target.value; }),
    }, ...Object.entries(KINDS).map(([value, text]) => el("option", { value }, text)));
    item.span = new SpanControl(`the clamp of feature ${feature}`, () => this.changed());
    item.condition = new Condition(feature, () => this.changed());
    const remove = el("button", {
      type: "button", "aria-label": `Remove feature ${feature}`,
      onclick: () => this.#remove(item),
    }, "Remove");
    item.root = el(
      "li", {}, el("div", { className: "title" }, item.name, remove), item.slider,
      el("div", { className: "row" }, item.kindSelect, item.output),
      el("div", { className: "row" }, item.span.root, item.condition.root), item.error);
    this.#show(item);
  }

  #show(item) {
    const { label, unit, unitName } = this.facts(item.feature);
    item.name.textContent = label;
    const value = number(this.#value(item));
    item.output.textContent = item.kind === "scale"
      ? `× ${value}`
      : `${number(item.times)} × ${unitName} = ${value}`;
    item.slider.setAttribute("aria-valuetext", item.output.textContent);
    if (item.times !== Number(item.slider.value)) item.slider.value = item.times;
    item.slider.dataset.unit = unit;
  }

  #remove(item) {
    this.items = this.items.filter((other) => other !== item);
    item.root.remove();
    this.changed();
    (this.items[0]?.slider ?? document.getElementById("label-query")).focus();
  }
}

const round = (value) => Number(value.toPrecision(6));
