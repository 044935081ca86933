// SPDX-License-Identifier: Apache-2.0
// Tokens shaded by a feature's activation; their top features on hover and arrow keys.

import { $, el, number } from "./dom.js";

/**
 * A run of tokens in an element.
 * A token: `{text, features: Map(index -> activation) | null, active}`; null means that
 * no activation was read there.
 */
export class TokenView {
  /** `label(index)`: a feature's text. `reads`: whether activations are to come. */
  constructor(root, label) {
    this.root = root;
    this.label = label;
    this.tokens = [];
    this.at = -1;
    this.shadedBy = null;
    root.classList.add("tokens");
    root.tabIndex = 0;
    root.addEventListener("keydown", (event) => this.#move(event));
    root.addEventListener("mouseover", (event) => {
      const index = [...root.children].indexOf(event.target);
      if (index >= 0) this.#inspect(index);
    });
  }

  clear() {
    this.tokens = [];
    this.at = -1;
    this.root.replaceChildren();
  }

  add(text) {
    const token = { text, features: null, active: 0, span: el("span", {}, text) };
    this.tokens.push(token);
    this.root.append(token.span);
    return token;
  }

  /** Set what was read at the token `index`: parallel lists. */
  read(index, features, values, active) {
    const token = this.tokens[index];
    if (!token) return;
    token.features = new Map(features.map((f, i) => [f, values[i]]));
    token.active = active;
    this.#shade(token);
  }

  /** Once all is read: tokens without an entry were left alone by the SAE. */
  finish(count) {
    this.tokens.slice(0, count).forEach((token) => {
      token.span.classList.toggle("bypassed", token.features === null);
    });
  }

  /** Shade by `feature` (null: not), full strength at the activation `top`. */
  shade(feature, top) {
    this.shadedBy = feature;
    this.top = top;
    this.tokens.forEach((token) => this.#shade(token));
  }

  /** The strongest activation of a feature here. */
  max(feature) {
    return Math.max(0, ...this.tokens.map((t) => t.features?.get(feature) ?? 0));
  }

  get text() {
    return this.tokens.map((token) => token.text).join("");
  }

  #shade(token) {
    const value = this.shadedBy === null ? 0 : token.features?.get(this.shadedBy) ?? 0;
    const strength = Math.min(1, Math.max(0, value) / (this.top || 1));
    token.span.style.background =
      strength > 0 ? `rgba(var(--shade), ${(0.08 + 0.67 * strength).toFixed(2)})` : "";
  }

  #move(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step || !this.tokens.length) return;
    event.preventDefault();
    this.#inspect(Math.min(this.tokens.length - 1, Math.max(0, this.at + step)));
  }

  #inspect(index) {
    this.at = index;
    document.querySelectorAll(".tokens .current").forEach((span) => (
      span.classList.remove("current")));
    this.tokens[index].span.classList.add("current");
    this.retell();
  }

  /** Labels have come: tell of the current token again. */
  retell() {
    const token = this.tokens[this.at];
    if (!token?.span.classList.contains("current")) return;
    $("inspector").textContent = `“${token.text}”: ${this.#describe(token)}`;
  }

  #describe(token) {
    if (!token.features) {
      return token.span.classList.contains("bypassed")
        ? "left alone by the SAE (a special token, or an outlier)"
        : "no activation read here (the last token of an answer has none)";
    }
    const top = [...token.features].filter(([, v]) => v > 0).sort((a, b) => b[1] - a[1]);
    const listed = top.slice(0, 5).map(([f, v]) => `${this.label(f)} ${number(v)}`);
    return `${token.active} features active. ${listed.join(" · ")}`;
  }
}
