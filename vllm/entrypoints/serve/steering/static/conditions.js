// SPDX-License-Identifier: Apache-2.0
// When a clamp acts: always, where its feature is active, or where another one is.

import { el } from "./dom.js";

const CHOICES = {
  always: "always",
  active: "where it is active",
  above: "where a feature is above",
  below: "where a feature is below",
};

export class Condition {
  /** `feature`: of the clamp; `changed`: called after a change. */
  constructor(feature, changed) {
    const name = `of the clamp of feature ${feature}`;
    this.select = el(
      "select", { "aria-label": `Condition ${name}`, onchange: () => this.#show(changed) },
      ...Object.entries(CHOICES).map(([value, text]) => el("option", { value }, text)));
    this.feature = el("input", {
      type: "number", min: 0, value: feature, "aria-label": `Feature in the condition ${name}`,
      oninput: changed,
    });
    this.bound = el("input", {
      type: "number", step: "any", value: 1, "aria-label": `Bound in the condition ${name}`,
      oninput: changed,
    });
    this.other = el("span", { hidden: true }, " feature ", this.feature, " at ", this.bound);
    this.root = el("label", {}, "acts ", this.select, this.other);
  }

  /** What it adds to a clamp entry. */
  get fields() {
    const choice = this.select.value;
    if (choice === "always") return {};
    if (choice === "active") return { only_if_active: true };
    const feature = Number(this.feature.value);
    return { when: { feature_idx: feature, [choice]: Number(this.bound.value) } };
  }

  /** The control that an error about `when` belongs to, by the field's name. */
  control(field) {
    if (this.other.hidden) return this.select;
    if (field.endsWith("feature_idx")) return this.feature;
    return /above|below/.test(field) ? this.bound : this.select;
  }

  #show(changed) {
    this.other.hidden = !["above", "below"].includes(this.select.value);
    changed();
  }
}
