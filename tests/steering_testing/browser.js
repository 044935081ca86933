// SPDX-License-Identifier: Apache-2.0
// Stands in for the browser: what the playground's scripts touch of it. A select has the
// value that was set, or else its selected or first option.

import { ANSWERS, SELECTS } from "./given.js";

const byId = new Map();
class Element {
  constructor(tag) {
    Object.assign(this, { tag, children: [], style: {}, dataset: {}, id: "", hidden: false });
    Object.assign(this, { textContent: "", checked: false, selected: false, listeners: {} });
    this.attributes = {};
    const names = new Set();
    this.classList = { add: (n) => names.add(n), remove: (n) => names.delete(n),
      contains: (n) => names.has(n), toggle: (n, on) => (on ? names.add(n) : names.delete(n)) };
  }
  get value() {
    if (this.given !== undefined || this.tag !== "select") return this.given ?? "";
    return (this.children.find((o) => o.selected) ?? this.children[0])?.value ?? "";
  }
  set value(text) { this.given = text; }
  get firstElementChild() { return this.children[0]; }
  append(...more) { this.children.push(...more); }
  replaceChildren(...own) { this.children = own.filter(Boolean); this.given = undefined; }
  addEventListener(kind, act) { this.listeners[kind] = act; }
  setAttribute(name, value) { this.attributes[name] = value; }
  focus() {}
  remove() {}
  text() {
    const inner = this.children.map((c) => (typeof c === "string" ? c : c.text()));
    return [this.textContent, ...inner].filter(Boolean).join(" ");
  }
}
const walk = (node) => [node, ...node.children.filter((c) => c.tag).flatMap(walk)];
globalThis.$ = (id) => {
  const made = [...byId.values()].flatMap(walk).find((node) => node.id === id);
  if (made) return made;
  const node = new Element(SELECTS.includes(id) ? "select" : "div");
  node.id = id;
  byId.set(id, node);
  return node;
};
globalThis.document = {
  getElementById: $,
  createElement: (tag) => new Element(tag),
  createElementNS: (_, tag) => new Element(tag),
  addEventListener() {},
  querySelectorAll: (css) => (css === "input[name=mode]"
    ? walk($("modes")).filter((node) => node.tag === "input") : []),
};
globalThis.location = { pathname: "/steering/", origin: "http://host" };
const kept = new Map();
globalThis.sessionStorage = { getItem: (k) => kept.get(k), setItem: (k, v) => kept.set(k, v) };
globalThis.asked = [];
globalThis.fetch = async (path, { body } = {}) => {
  asked.push({ path, body: body && JSON.parse(body) });
  const found = Object.entries(ANSWERS).find(([start]) => path.startsWith(start));
  return { ok: Boolean(found), status: found ? 200 : 404, json: async () => found?.[1] ?? {} };
};
globalThis.settled = () => new Promise((done) => setTimeout(done, 20));
