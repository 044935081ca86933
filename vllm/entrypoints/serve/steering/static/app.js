// SPDX-License-Identifier: Apache-2.0
// The page: what the server has, what is chosen, and who shows which error.

import { call, key, routes } from "./api.js";
import { Clamps } from "./clamps.js";
import { answer, Column, MODES } from "./columns.js";
import { $, el, number, options, showError } from "./dom.js";
import { blame, clearErrors } from "./errors.js";
import { asCurl, asPreset, asPython } from "./export.js";
import { byLabel, byText, evidenceOf, labelOf } from "./search.js";
import { measure, plot, STRENGTHS, wordList } from "./sweep.js";
import { TokenView } from "./tokens.js";
import { Vectors } from "./vectors.js";

const MOST_COLUMNS = 4;
// A maximum above this multiple of the 99 % quantile comes from a few odd tokens.
const OUTLIER = 4;
const server = { model: "", modules: [], reads: false };
const vectors = new Vectors($("vectors"));
const known = new Map(); // feature -> {label, max, p99, …} at the chosen site
const clamps = new Clamps($("clamps"), facts, clampsChanged);
let columns = [];
let running = null;

const chosen = () => server.modules.find((m) => m.name === $("module").value);
const views = () => [...columns.map((column) => column.view), readView];

/**
 * What is known of a feature. `unit`: a strong activation, in which sliders count; 1
 * until something has been seen.
 */
function facts(feature) {
  const { label, max, p99, seen } = known.get(feature) ?? {};
  const name = label ? `${label} (${feature})` : `Feature ${feature}`;
  if (max && p99 && max > OUTLIER * p99) {
    return { label: name, unit: p99, unitName: "its 99 % quantile" };
  }
  const unitName = max ? "its maximum" : "the strongest seen here";
  return { label: name, unit: max || seen || 1, unitName };
}

/** The label of a feature that was read; asked for when it is first shown. */
function labelled(feature) {
  const module = chosen();
  if (module && !known.has(feature)) {
    remember(feature, {});
    labelOf(module.name, feature).then((label) => {
      if (!label || chosen() !== module) return;
      remember(feature, { label });
      views().forEach((view) => view.retell());
    }).catch(() => { /* a module need not have labels */ });
  }
  return facts(feature).label;
}

function remember(feature, news) {
  known.set(feature, { ...known.get(feature), ...news });
}

function state() {
  const module = chosen();
  return {
    model: server.model,
    prompt: $("prompt").value,
    chat: $("chat").checked,
    maxTokens: Number($("max-tokens").value),
    temperature: Number($("temperature").value),
    seed: Number($("seed").value),
    module: module?.name,
    site: $("site").value,
    clamps: clamps.entries(),
    vectors: vectors.entries(),
  };
}

// --- The server ---------------------------------------------------------------

async function connect() {
  showError($("key-error"), "");
  $("server").textContent = "Connecting…";
  try {
    const [models, modules, paths] = await Promise.all([
      call("/v1/models"), call("/v1/steering/modules"), routes()]);
    server.model = models.data[0].id;
    server.modules = modules.modules;
    server.reads = paths === null || paths.includes("/v1/steering/encode");
    $("server").textContent = `${server.model}: ${server.modules.length} module(s)`;
    $("text-form").hidden = !server.reads;
    $("keys").open = false;
    showModules();
  } catch (error) {
    $("server").textContent = "Not connected";
    if (error.status === 401 || error.status === 403) $("keys").open = true;
    showError($("key-error"), error.message, $("server-key"));
  }
}

function showModules() {
  const saes = server.modules.filter((m) => m.kind === "sae");
  options($("module"), saes.map((m) => [m.name, m.name]));
  const others = server.modules.filter((m) => m.kind === "vectors");
  $("vectors-section").hidden = others.length === 0;
  vectors.show(others.map((m) => m.name));
  const hasVectors = others.length > 0;
  const inputs = Object.entries(MODES).map(([mode, text]) => el("label", {}, el("input", {
    type: "checkbox", value: mode, name: "mode", onchange: modesChanged,
    checked: mode !== "vectors" && (mode === "plain" || saes.length > 0),
    disabled: mode === "vectors" ? !hasVectors : mode !== "plain" && !saes.length,
  }), ` ${text}`));
  $("modes").replaceChildren($("modes").firstElementChild, ...inputs);
  moduleChanged();
  modesChanged();
}

async function moduleChanged() {
  const names = chosen()?.sites.map(({ name }) => [name, name]) ?? [];
  options($("site"), names);
  $("site-choice").hidden = names.length < 2;
  await siteChanged();
}

/** Another site has other features: nothing that was found or answered is of them. */
async function siteChanged() {
  stop();
  known.clear();
  clamps.clear();
  columns.forEach((column) => column.clear());
  readView.clear();
  $("read-tokens").hidden = true;
  $("found").replaceChildren();
  $("search-status").textContent = "";
  $("module-sites").replaceChildren();
  const [module, site] = [chosen(), $("site").value];
  if (!module) {
    $("module-facts").textContent = "No SAE is loaded.";
    return;
  }
  const { card, sites } = await evidence([]).catch(() => ({ card: {}, sites: {} }));
  if (chosen() !== module || $("site").value !== site) return;
  const { d_sae: width } = module.sites.find(({ name }) => name === site);
  const cost = card.ce_plain == null ? ""
    : `, cross-entropy ${number(card.ce_plain)} → ${number(card.ce_reconstructed)} reconstructed`;
  $("module-facts").textContent = `${width} features${cost}`;
  $("module-sites").replaceChildren(...module.sites.map(({ name }) => {
    // The card speaks of the module, hence of its site where there is one.
    const told = sites[name] ?? (module.sites.length === 1 ? card : {});
    const figures = [["FVU", told.fvu], ["L0", told.l0]].filter(([, value]) => value != null);
    const text = figures.map(([kind, value]) => `${kind} ${number(value)}`).join(", ");
    return el("li", {}, text ? `${name}: ${text}` : name);
  }));
}

/** What the files beside the module say of some features of the site. */
async function evidence(features) {
  const [module, site] = [chosen(), $("site").value];
  const found = await evidenceOf(module.name, site, features);
  if (chosen() !== module || $("site").value !== site) return found;
  for (const [feature, news] of Object.entries(found.features)) {
    remember(Number(feature), news);
  }
  return found;
}

// --- Columns ------------------------------------------------------------------

function modesChanged() {
  const boxes = [...document.querySelectorAll("input[name=mode]")];
  const modes = boxes.filter((box) => box.checked).map((box) => box.value);
  boxes.forEach((box) => {
    const able = box.value === "plain" || (box.value === "vectors" ? vectors.items.length : chosen());
    box.disabled = !able || (!box.checked && modes.length >= MOST_COLUMNS);
  });
  const kept = new Map(columns.map((column) => [column.mode, column]));
  columns = modes.map((mode) => kept.get(mode) ?? new Column(mode, labelled));
  $("columns").replaceChildren(...columns.map((column) => column.root));
  options($("export-column"), modes.map((mode) => [mode, MODES[mode]]), modes.at(-1));
  shadeChanged();
}

function clampsChanged() {
  $("no-clamps").hidden = clamps.features.length > 0;
  const entries = clamps.features.map((f) => [String(f), facts(f).label]);
  options($("sweep-feature"), entries, $("sweep-feature").value);
  options($("shade"), [["", "nothing"], ...entries], $("shade").value || entries.at(-1)?.[0]);
  shadeChanged();
}

function shadeChanged() {
  const feature = $("shade").value === "" ? null : Number($("shade").value);
  $("legend").hidden = feature === null;
  const top = feature === null ? 1 : facts(feature).unit;
  views().forEach((view) => view.shade(feature, top));
}

async function run(event) {
  event?.preventDefault();
  running?.abort();
  running = new AbortController();
  const { signal } = running;
  clearErrors(clamps, vectors, columns);
  $("run").disabled = true;
  $("stop").disabled = false;
  const current = state();
  await Promise.all(columns.map(async (column) => {
    try {
      if (needsClamps(column.mode) && !current.clamps.length) {
        column.view.clear();
        column.status.textContent = "Clamp a feature first.";
        return;
      }
      await column.run(current, server.reads, signal);
    } catch (error) {
      if (error.name === "AbortError") column.status.textContent = "Stopped.";
      else blame(error, column, current, clamps, vectors);
    }
  }));
  if (!signal.aborted) {
    $("run").disabled = false;
    $("stop").disabled = true;
  }
}

const needsClamps = (mode) => mode === "delta" || mode === "full";

function stop() {
  running?.abort();
  $("run").disabled = false;
  $("stop").disabled = true;
}

// --- Finding features ---------------------------------------------------------

const readView = new TokenView($("read-tokens"), labelled);

async function clampFeature(feature) {
  const module = chosen();
  if (!module) return;
  clamps.add(feature);
  const [, label] = await Promise.all([
    evidence([feature]).catch(() => null),
    labelOf(module.name, feature).catch(() => null)]);
  if (label) remember(feature, { label });
  clamps.refresh();
  clampsChanged();
}

async function search(event, find) {
  event.preventDefault();
  showError($("search-error"), "");
  $("search-status").textContent = "Searching…";
  $("found").replaceChildren();
  try {
    const found = await find(chosen()?.name);
    const features = found.map((entry) => entry.feature);
    await evidence(features).catch(() => null);
    $("search-status").textContent = `${found.length} feature(s)`;
    $("found").replaceChildren(...found.map(showFound));
  } catch (error) {
    $("search-status").textContent = "";
    showError($("search-error"), error.message);
  }
}

function showFound({ feature, mean, elsewhere }) {
  const { frequency, max, p99, contexts = [], neuronpedia } = known.get(feature) ?? {};
  const seen = [];
  if (max != null) seen.push(`maximum ${number(max)}`);
  if (p99 != null) seen.push(`99 % quantile ${number(p99)}`);
  if (mean !== undefined) seen.push(`mean ${number(mean)} here, ${number(elsewhere)} elsewhere`);
  if (frequency != null) seen.push(`active on ${number(frequency * 100)} % of tokens`);
  const button = el("button", {
    type: "button", "aria-label": `Clamp feature ${feature}`,
    onclick: () => clampFeature(feature),
  }, "Clamp");
  const item = el(
    "li", {}, el("div", { className: "title" }, el("span", {}, facts(feature).label), button),
    el("div", { className: "hint" }, seen.join("; ")));
  for (const [before, token, after] of contexts.slice(0, 2)) {
    item.append(el("div", {}, el("q", {}, before, el("mark", {}, token), after)));
  }
  if (neuronpedia) {
    item.append(el("a", { href: `https://www.neuronpedia.org/${neuronpedia}/${feature}`,
      rel: "noreferrer", target: "_blank" }, "Neuronpedia"));
  }
  return item;
}

async function searchLabels(module) {
  const found = await byLabel(module, $("label-query").value.trim());
  found.forEach(({ feature, label }) => remember(feature, { label }));
  return found;
}

async function searchTexts(module) {
  const lines = (id) => $(id).value.split("\n").filter((line) => line.trim());
  if (!lines("text-a").length) throw new Error("Write at least one sentence.");
  const { found, texts } = await byText(
    module, $("site").value, lines("text-a"), lines("text-b"));
  await Promise.all(found.map(async ({ feature, max }) => {
    const label = await labelOf(module, feature).catch(() => null);
    remember(feature, { seen: max, ...(label && { label }) });
  }));
  readView.clear();
  for (const { tokens, positions, features, values, num_active: active } of texts) {
    const first = readView.tokens.length;
    tokens.forEach((token) => readView.add(token));
    positions.forEach((p, i) => readView.read(first + p, features[i], values[i], active[i]));
    readView.add("\n");
  }
  readView.finish(readView.tokens.length);
  $("read-tokens").hidden = false;
  if (found.length) readView.shade(found[0].feature, found[0].max);
  return found;
}

// --- Sweep and export ---------------------------------------------------------

async function sweep(event) {
  event.preventDefault();
  showError($("sweep-error"), "", $("sweep-feature"));
  const feature = Number($("sweep-feature").value);
  if ($("sweep-feature").value === "") {
    showError($("sweep-error"), "Clamp a feature first.", $("sweep-feature"));
    return;
  }
  const wanted = wordList($("sweep-words").value);
  if (!wanted.length) {
    showError($("sweep-error"), "Write the words that count.", $("sweep-words"));
    return;
  }
  const mode = $("sweep-tier").value;
  const points = [];
  running?.abort();
  running = new AbortController();
  const { signal } = running;
  $("stop").disabled = false;
  try {
    for (const strength of STRENGTHS) {
      const asked = { ...state(), clamps: clamps.held(feature, strength) };
      const text = await answer(mode, asked, signal);
      points.push({ strength, ...measure(text, wanted) });
      const title = `${facts(feature).label}: share of words by strength, ${MODES[mode]}`;
      $("sweep-plot").replaceChildren(...plot(points, title, facts(feature).unitName));
    }
  } catch (error) {
    if (error.name !== "AbortError") showError($("sweep-error"), error.message);
  }
  if (running?.signal === signal) $("stop").disabled = true;
}

async function copy(kind) {
  const make = { curl: asCurl, python: asPython, preset: asPreset }[kind];
  const text = make($("export-column").value, state());
  $("export").textContent = text;
  $("export").hidden = false;
  try {
    await navigator.clipboard.writeText(text);
    $("copied").textContent = "Copied.";
  } catch {
    $("copied").textContent = "Shown below: this page may not write to the clipboard.";
  }
}

// --- Wiring -------------------------------------------------------------------

$("prompt-form").addEventListener("submit", run);
$("stop").addEventListener("click", stop);
$("module").addEventListener("change", moduleChanged);
$("site").addEventListener("change", siteChanged);
$("shade").addEventListener("change", shadeChanged);
$("label-form").addEventListener("submit", (event) => search(event, searchLabels));
$("text-form").addEventListener("submit", (event) => search(event, searchTexts));
$("sweep-form").addEventListener("submit", sweep);
$("index-form").addEventListener("submit", (event) => {
  event.preventDefault();
  clampFeature(Number($("index").value));
});
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key.set($("server-key").value);
  connect();
});
document.querySelectorAll("[data-copy]").forEach((button) => {
  button.addEventListener("click", () => copy(button.dataset.copy));
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) run();
});
$("server-key").value = key.get();
connect();
