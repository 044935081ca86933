// SPDX-License-Identifier: Apache-2.0
// Features by label, and by what is active on one text and not on another; and what the
// files beside a module say of them.

import { call } from "./api.js";

const TOP_K = 64;
const SHOWN = 12;

const pathOf = (module) => `/v1/steering/modules/${encodeURIComponent(module)}`;

/** The card of a module, and what is known of some features of one of its sites. */
export async function evidenceOf(module, site, features) {
  const query = `index=${features.join(",")}&site=${encodeURIComponent(site)}`;
  return call(`${pathOf(module)}/evidence?${query}`);
}

/** Features whose label has `query`: `[{feature, label}]`. */
export async function byLabel(module, query) {
  const path = `${pathOf(module)}/features`;
  const { features } = await call(`${path}?limit=${SHOWN}&q=${encodeURIComponent(query)}`);
  return features.map(({ feature_idx: feature, label }) => ({ feature, label }));
}

/** The label of one feature, or null. */
export async function labelOf(module, feature) {
  const { features } = await call(`${pathOf(module)}/features?index=${feature}`);
  return features[0]?.label ?? null;
}

/**
 * Features of a site that are active on every line of `wanted` and little on `other`'s.
 * `{found: [{feature, mean, elsewhere, max}], texts}`; `texts`: tokens of `wanted` with
 * what was read at them.
 */
export async function byText(module, site, wanted, other) {
  const input = [...wanted, ...other];
  const { data } = await call(
    "/v1/steering/encode", { module_name: module, sites: [site], input, top_k: TOP_K });
  // A text that the SAE leaves alone has no record.
  const nothing = { positions: [], features: [], values: [], num_active: [] };
  const texts = data.map(({ tokens, sae_features: read }) => (
    { tokens, ...nothing, ...read[site] }));
  const sums = texts.map(total);
  const found = new Map();
  sums.forEach((sum, i) => {
    for (const [feature, { mean, max }] of sum) {
      const entry = found.get(feature) ?? { feature, on: [], off: 0, max: 0 };
      if (i < wanted.length) {
        entry.on.push(mean);
        entry.max = Math.max(entry.max, max);
      } else entry.off += mean / other.length;
      found.set(feature, entry);
    }
  });
  const ranked = [...found.values()]
    // The weakest text decides: a feature of the topic is active on all of them.
    .map(({ feature, on, off, max }) => ({
      feature, max, elsewhere: off,
      mean: on.reduce((a, b) => a + b, 0) / wanted.length,
      score: (on.length === wanted.length ? Math.min(...on) : 0) - off,
    }))
    .filter(({ score }) => score > 0)
    .sort((a, b) => b.score - a.score)
    .slice(0, SHOWN);
  return { found: ranked, texts: texts.slice(0, wanted.length) };
}

/** By feature: mean over the tokens that were read, and the largest value. */
function total({ positions, features, values }) {
  const sum = new Map();
  features.forEach((indices, i) => indices.forEach((feature, j) => {
    const entry = sum.get(feature) ?? { mean: 0, max: 0 };
    entry.mean += values[i][j] / positions.length;
    entry.max = Math.max(entry.max, values[i][j]);
    sum.set(feature, entry);
  }));
  return sum;
}
