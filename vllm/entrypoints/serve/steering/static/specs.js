// SPDX-License-Identifier: Apache-2.0
// What a column asks for, in the fields of the server; and who an error is about.

const FIELDS = {
  reconstruction: "sae_full_reconstruction_specs",
  full: "sae_full_reconstruction_specs",
  delta: "sae_clamp_specs",
  vectors: "steering_vector_specs",
};

/** Clamps by their tokens, which belong to a spec: `[{where, clamps: [index, …]}]`. */
function groups(clamps) {
  const found = new Map();
  clamps.forEach(({ where }, index) => {
    const key = JSON.stringify(where);
    if (!found.has(key)) found.set(key, { where, clamps: [] });
    found.get(key).clamps.push(index);
  });
  return [...found.values()];
}

/**
 * The steering fields of a mode. `state`: module, its chosen site (`post_block.20`),
 * `clamps: [{entry, where}]`, `vectors: [{name, edit, where}]`.
 */
export function fields(mode, { module, site, clamps, vectors }) {
  const field = FIELDS[mode];
  switch (mode) {
    case "reconstruction":
      return { [field]: [{ module_name: module, clamps: { [site]: [] } }] };
    case "delta":
    case "full":
      return {
        [field]: groups(clamps).map(({ where, clamps: indices }) => ({
          module_name: module,
          clamps: { [site]: indices.map((index) => clamps[index].entry) },
          ...where,
        })),
      };
    case "vectors":
      return {
        [field]: vectors.map(({ name, edit, where }) => ({ module_name: name, ...edit, ...where })),
      };
    default:
      return {};
  }
}

/**
 * Path and body of a request for `mode`. The server's default preset is left out, so
 * that a column is what its title says.
 */
export function request(mode, state) {
  const body = {
    model: state.model,
    max_tokens: state.maxTokens,
    temperature: state.temperature,
    seed: state.seed,
    steering_preset: null,
    ...fields(mode, state),
  };
  if (state.chat) {
    body.messages = [{ role: "user", content: state.prompt }];
    return { path: "/v1/chat/completions", body };
  }
  return { path: "/v1/completions", body: { ...body, prompt: state.prompt } };
}

/** What a request reads of its answer: the strongest features at the chosen site. */
export function reading({ module, site }, topK) {
  return [{ module_name: module, sites: [site], top_k: topK, phase: "decode" }];
}

/**
 * What the field's path of a refusal is about: `{clamp, field}` or `{vector, field}`
 * with the place in the state's list, or null. `where`: the path, or a text that
 * begins with it.
 */
export function culprit(where, { clamps }) {
  const found = where.match(/(sae_full_reconstruction_specs|sae_clamp_specs|steering_vector_specs)\[(\d+)\](\S*)/);
  if (!found) return null;
  const [, list, spec, rest] = found;
  if (list === FIELDS.vectors) return { vector: Number(spec), field: tail(rest) };
  const group = groups(clamps)[Number(spec)];
  if (!group) return null;
  // `.clamps.post_block.20[1].feature_idx`: the entry, then its field.
  const entry = rest.match(/^\.clamps[^[]*\[(\d+)\](\S*)/);
  if (entry) return { clamp: group.clamps[Number(entry[1])], field: tail(entry[2]) };
  return /^\.(spans|phase)/.test(rest) ? { clamp: group.clamps[0], field: tail(rest) } : null;
}

/** A path without its leading dot and closing colon. */
const tail = (path) => path.replace(/^\./, "").replace(/:$/, "");
