// SPDX-License-Identifier: Apache-2.0
// Which tokens something acts on: a list of choices, and a part of the answer by number.

import { el } from "./dom.js";

const CHOICES = {
  both: "prompt and answer",
  decode: "the answer",
  prefill: "the prompt",
  last: "the prompt’s last token",
  part: "a part of the answer",
};

export class SpanControl {
  /** `name`: what it is about, for screen readers; `changed`: called after a change. */
  constructor(name, changed) {
    this.select = el(
      "select", { "aria-label": `Tokens of ${name}`, onchange: () => this.#show(changed) },
      ...Object.entries(CHOICES).map(([value, text]) => el("option", { value }, text)));
    const number = (label, value) => el("input", {
      type: "number", min: 0, value, "aria-label": `${label} of ${name}`, oninput: changed,
    });
    this.from = number("First token", 0);
    this.to = number("Token after the last", 20);
    this.part = el("span", { hidden: true }, " from ", this.from, " to ", this.to);
    this.root = el("label", {}, "on ", this.select, this.part);
  }

  /** `{phase}` or `{spans}` of a spec. */
  get fields() {
    const choice = this.select.value;
    if (choice === "last") return { spans: [{ of: "prompt", start: -1 }] };
    if (choice !== "part") return { phase: choice };
    const stop = this.to.value === "" ? null : Number(this.to.value);
    return { spans: [{ of: "generated", start: Number(this.from.value), stop }] };
  }

  /** The control that an error about `spans` belongs to. */
  get control() {
    return this.part.hidden ? this.select : this.to;
  }

  #show(changed) {
    this.part.hidden = this.select.value !== "part";
    changed();
  }
}
