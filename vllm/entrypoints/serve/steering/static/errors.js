// SPDX-License-Identifier: Apache-2.0
// Which control shows which error of the server.

import { ServerError } from "./api.js";
import { $, showError } from "./dom.js";
import { culprit } from "./specs.js";

// Fields of a request that a control of the page holds, and where its error is shown.
const FIELDS = {
  max_tokens: ["max-tokens", "generation-error"],
  max_completion_tokens: ["max-tokens", "generation-error"],
  temperature: ["temperature", "generation-error"],
  seed: ["seed", "generation-error"],
  prompt: ["prompt", "prompt-error"],
  messages: ["prompt", "prompt-error"],
  module_name: ["module", "module-error"],
};

const CONTROLS = [
  ["prompt", "prompt-error"], ["max-tokens", "generation-error"],
  ["temperature", "generation-error"], ["seed", "generation-error"],
  ["module", "module-error"], ["server-key", "key-error"],
];

export function clearErrors(clamps, vectors, columns) {
  clamps.forgive();
  vectors.forgive();
  CONTROLS.forEach(([control, place]) => showError($(place), "", $(control)));
  columns.forEach((column) => showError(column.error, ""));
}

/** Show an error beside the control that caused it, else in its column. */
export function blame(error, column, state, clamps, vectors) {
  column.status.textContent = "Refused.";
  if (!(error instanceof ServerError)) {
    showError(column.error, String(error));
    return;
  }
  const { message, status, param } = error;
  if (status === 401) {
    $("keys").open = true;
    showError($("key-error"), message, $("server-key"));
    return;
  }
  const found = culprit(param, state) ?? culprit(message, state);
  if (found?.clamp !== undefined && clamps.blame(found.clamp, found.field, message)) return;
  if (found?.vector !== undefined && vectors.blame(found.vector, found.field, message)) return;
  const field = fieldOf(param, message);
  if (field) showError($(FIELDS[field][1]), message, $(FIELDS[field][0]));
  else showError(column.error, message);
}

/** The field of the page that an error names: by its path, else by its message. */
function fieldOf(param, message) {
  const last = param.split(".").at(-1).replace(/\[\d+\]$/, "");
  if (last in FIELDS) return last;
  const names = Object.keys(FIELDS);
  const named = names.find((name) => new RegExp(`\\b${name}\\b`).test(message));
  return named ?? (/context length|input tokens/.test(message) ? "max_tokens" : null);
}
