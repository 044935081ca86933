// SPDX-License-Identifier: Apache-2.0
// Share of on-topic words against the strength of one clamp, as a plot and a table.

import { el, svg } from "./dom.js";

export const STRENGTHS = [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 2];
const WIDTH = 520;
const HEIGHT = 220;
const EDGE = { left: 42, right: 12, top: 12, bottom: 34 };

const words = (text) => text.toLowerCase().match(/[\p{L}\p{N}'’]+/gu) ?? [];

/** `{topic, variety}`: the share of words that count, and that are not repetitions. */
export function measure(text, wanted) {
  const all = words(text);
  if (!all.length) return { topic: 0, variety: 0 };
  const hits = all.filter((word) => wanted.some((w) => word.startsWith(w)));
  return { topic: hits.length / all.length, variety: new Set(all).size / all.length };
}

export const wordList = (text) => words(text);

/** Draw `points`: `[{strength, topic, variety}]`; strengths are multiples of `unit`. */
export function plot(points, title, unit) {
  const right = Math.max(...STRENGTHS);
  const x = (s) => EDGE.left + (s / right) * (WIDTH - EDGE.left - EDGE.right);
  const y = (v) => HEIGHT - EDGE.bottom - v * (HEIGHT - EDGE.top - EDGE.bottom);
  const line = (key) => points.map((p) => `${x(p.strength)},${y(p[key])}`).join(" ");
  const label = (px, py, text, anchor) =>
    svg("text", { x: px, y: py, "text-anchor": anchor }, text);
  const picture = svg(
    "svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": title },
    ...[0, 0.5, 1].flatMap((v) => [
      svg("line", { class: "axis", x1: x(0), x2: x(right), y1: y(v), y2: y(v) }),
      label(EDGE.left - 6, y(v) + 4, `${v * 100} %`, "end"),
    ]),
    ...STRENGTHS.map((s) => label(x(s), HEIGHT - EDGE.bottom + 16, String(s), "middle")),
    label(x(right), HEIGHT - 4, `× ${unit}`, "end"),
    svg("polyline", { class: "variety", points: line("variety") }),
    svg("polyline", { class: "topic", points: line("topic") }),
    ...points.map((p) => svg("circle", { cx: x(p.strength), cy: y(p.topic), r: 3.5 })));
  const cells = (name, key) => el(
    "tr", {}, el("th", { scope: "row" }, name),
    ...points.map((p) => el("td", {}, `${Math.round(p[key] * 100)} %`)));
  const table = el(
    "table", {}, el("caption", { className: "hint" }, title),
    el("tr", {}, el("th", { scope: "row" }, "Strength"),
      ...points.map((p) => el("th", { scope: "col" }, String(p.strength)))),
    cells("Words that count (solid)", "topic"),
    cells("Words not repeated (dashed)", "variety"));
  return [picture, table];
}
