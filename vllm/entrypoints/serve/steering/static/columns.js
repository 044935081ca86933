// SPDX-License-Identifier: Apache-2.0
// One answer for each mode, side by side, streamed.

import { call, stream } from "./api.js";
import { el } from "./dom.js";
import { reading, request } from "./specs.js";
import { TokenView } from "./tokens.js";

export const MODES = {
  plain: "Plain",
  reconstruction: "Pure reconstruction",
  delta: "Delta",
  full: "Full reconstruction",
  vectors: "Vectors",
};
const TOP_K = 24;

export class Column {
  constructor(mode, label) {
    this.mode = mode;
    this.status = el("p", { className: "hint", role: "status" });
    this.error = el("p", { className: "error", role: "alert", hidden: true });
    const title = el("h3", { id: `column-${mode}` }, MODES[mode]);
    const text = el("div", { role: "group", "aria-labelledby": title.id });
    this.root = el(
      "article", { className: "column" }, title, text, this.status, this.error);
    this.root.dataset.mode = mode;
    this.view = new TokenView(text, label);
  }

  clear() {
    this.view.clear();
    this.status.textContent = "";
  }

  /** Stream the answer; throws a ServerError. */
  async run(state, reads, signal) {
    this.view.clear();
    this.status.textContent = "…";
    const { path, body } = request(this.mode, state);
    body.return_token_ids = true;
    if (reads && state.module) body.sae_readout_specs = reading(state, TOP_K);
    const start = performance.now();
    let prompt = null;
    let tokens = 0;
    let active = [];
    let reason = "";
    const firsts = []; // first token of each piece of text
    for await (const event of stream(path, body, signal)) {
      const choice = event.choices?.[0];
      if (!choice) continue;
      prompt ??= (event.prompt_token_ids ?? choice.prompt_token_ids)?.length ?? null;
      const text = choice.text ?? choice.delta?.content ?? "";
      const count = choice.token_ids?.length ?? (text ? 1 : 0);
      if (text || count) {
        this.view.add(text);
        firsts.push(tokens);
        tokens += count;
      }
      active = active.concat(this.#take(choice.sae_features, prompt, firsts));
      reason = choice.finish_reason ?? reason;
    }
    if (reads) this.view.finish(this.view.tokens.length - 1);
    const seconds = (performance.now() - start) / 1000;
    const l0 = active.length ? `, L0 ${Math.round(mean(active))}` : "";
    this.status.textContent =
      `${tokens} tokens, ${(tokens / seconds).toFixed(1)} a second${l0}` +
      (reason === "length" ? ", cut at the limit" : "");
  }

  /** Give a chunk's activations to the pieces of text that hold their tokens. */
  #take(read, prompt, firsts) {
    const active = [];
    if (!read || prompt === null) return active;
    for (const sites of Object.values(read)) {
      for (const { positions, features, values, num_active: num } of Object.values(sites)) {
        positions.forEach((position, i) => {
          const token = position - prompt;
          const piece = firsts.findLastIndex((first) => first <= token);
          this.view.read(piece, features[i], values[i], num?.[i] ?? features[i].length);
          if (num) active.push(num[i]);
        });
      }
    }
    return active;
  }
}

const mean = (numbers) => numbers.reduce((a, b) => a + b, 0) / numbers.length;

/** A whole answer at once, for sweeps. */
export async function answer(mode, state, signal) {
  const { path, body } = request(mode, state);
  const { choices } = await call(path, body, signal);
  return choices.map((c) => c.text ?? c.message?.content ?? "").join("\n");
}
