# SPDX-License-Identifier: Apache-2.0
"""Draws the benchmarks' result files: kernels, and whole engines.

    python benchmarks/plot_results.py [FILE ...] [--out FOLDER]

Without a file, all in benchmarks/results/. Writes docs/kernels_<gpu>.png (time against
tokens, with floor and baselines) and docs/engine_<gpu>.png (throughput against batch,
and shares of stock).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent

LINES = {
    "jumprelu": ("JumpReLU, L0 = 100", "C0", "o-"),
    "topk": ("TopK, k = 64", "C1", "s-"),
    "cublas_pair": ("dense cuBLAS pair, bf16, graphed", "C2", "^--"),
    "torch_port": ("plain torch port", "C3", "v--"),
}
# mode: (label, colour, style)
MODES = {
    "stock": ("stock vLLM", "k", "o-"),
    "idle": ("configured, idle", "C2", "s--"),
    "one site": ("one site, every request", "C0", "^-"),
    "four sites": ("four sites, every request", "C1", "v-"),
    "stock again": ("stock vLLM, a second engine", "0.3", "x:"),
    "stock eager": ("stock vLLM, eager", "0.6", "D:"),
    "hugging face + hook": ("Hugging Face generate + hook", "C3", "*"),
}

Row = dict[str, Any]


def series(rows: list[Row], shape: str, case: str, key: str) -> Any:
    """(tokens, values) of one case at one shape, by tokens."""
    found = [r for r in rows if r["shape"] == shape and r["case"] == case]
    found.sort(key=lambda row: row["tokens"])
    return [r["tokens"] for r in found], [r[key] for r in found]


def draw_kernels(plt: Any, data: Row) -> Any:
    """One panel per shape: microseconds against tokens."""
    rows = data["kernel"]
    shapes = list(dict.fromkeys(r["shape"] for r in rows if r["case"] == "jumprelu"))
    figure, panels = plt.subplots(
        1, len(shapes), figsize=(5 * len(shapes), 4.2), squeeze=False
    )
    for panel, shape in zip(panels[0], shapes, strict=True):
        tokens, floor = series(rows, shape, "jumprelu", "floor_us")
        panel.plot(tokens, floor, "k:", label="floor: bytes or flops")
        for case, (label, colour, style) in LINES.items():
            at, us = series(rows, shape, case, "us")
            if at:
                panel.plot(at, us, style, color=colour, label=label)
        panel.set(xscale="log", yscale="log", xlabel="tokens", ylabel="microseconds")
        panel.set_title(f"F x D = {shape.replace('x', ' x ')}")
        panel.grid(True, which="both", alpha=0.2)
    panels[0][0].legend(fontsize=8)
    figure.suptitle(f"Full reconstruction of every token, {data['gpu']}, cold L2")
    return figure


def draw_throughput(panel: Any, rows: list[Row]) -> None:
    """Decoded tokens per second against batch, a line per mode."""
    decodes = [row for row in rows if row.get("phase") == "decode" and "batch" in row]
    for mode, (label, colour, style) in MODES.items():
        found = [row for row in decodes if row["mode"] == mode]
        found.sort(key=lambda row: row["batch"])
        if found:
            at = [row["batch"] for row in found]
            rate = [row["tokens_per_s"] for row in found]
            panel.plot(at, rate, style, color=colour, label=label, alpha=0.8)
    batches = sorted({row["batch"] for row in decodes})
    panel.set(xscale="log", yscale="log", xlabel="batch", ylabel="tokens per second")
    panel.set_xticks(batches, [str(batch) for batch in batches])
    panel.minorticks_off()
    panel.set_title("decode")
    panel.grid(True, which="both", alpha=0.2)
    panel.legend(fontsize=8)


def draw_shares(panel: Any, rows: list[Row], targets: list[Row]) -> None:
    """Percent of stock by both clocks, with quartiles over rounds and targets."""
    wanted: dict[Any, float] = {
        (row["mode"], row["phase"], row["batch"]): row["wanted"] for row in targets
    }
    steered = ("idle", "one site", "four sites")
    phases = [("decode", b) for b in (1, 64, 256)] + [("prefill", 8)]
    places = {place: at for at, place in enumerate(phases)}
    for row in rows:
        place = (row.get("phase"), row.get("batch"))
        if row["mode"] not in steered or place not in places:
            continue
        label, colour, _ = MODES[row["mode"]]
        x = places[place] + 0.25 * (steered.index(row["mode"]) - 1)
        first = place == phases[0]
        for key, marker, shift in (("ratio", "o", -0.05), ("ratio_gpu", "x", 0.05)):
            if key not in row:
                continue
            middle, low, high = (
                100 * (row[name] if (name := f"{key}{quartile}") in row else row[key])
                for quartile in ("", "_p25", "_p75")
            )
            clock = "wall" if key == "ratio" else "GPU"
            panel.errorbar(
                x + shift, middle, [[middle - low], [high - middle]], fmt=marker,
                color=colour, capsize=2, label=f"{label}: {clock}" if first else None,
            )  # fmt: skip
        if target := wanted.get((row["mode"], *place)):
            panel.hlines(100 * target, x - 0.1, x + 0.1, colour, linestyles="dotted")
    panel.axhline(100, color="k", linewidth=0.8)
    panel.set_xticks(range(len(phases)), [f"{name} {batch}" for name, batch in phases])
    panel.set(ylabel="% of stock vLLM", title="share of stock (dotted: target)")
    panel.grid(True, axis="y", alpha=0.2)
    panel.legend(fontsize=7)


def draw_engine(plt: Any, data: Row) -> Any:
    """Throughput, and shares of stock."""
    rows = data["engine"]
    figure, panels = plt.subplots(1, 2, figsize=(12, 4.6))
    draw_throughput(panels[0], rows)
    draw_shares(panels[1], rows, data.get("engine_targets", []))
    gpu = data["engine_environment"]["gpu"]
    figure.suptitle(f"Gemma-2-2B's shape, JumpReLU SAEs 16384 x 2304, {gpu}")
    return figure


def main() -> None:
    """Draws every figure that a result file has rows for."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="*")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for results in args.results or sorted((HERE / "results").glob("*.json")):
        data = json.loads(results.read_text())
        for rows, name, draw in (
            ("kernel", "kernels", draw_kernels),
            ("engine", "engine", draw_engine),
        ):
            if not data.get(rows):
                continue
            figure = draw(plt, data)
            figure.tight_layout()
            out = args.out / f"{name}_{results.stem}.png"
            figure.savefig(out, dpi=130)
            print(out)


if __name__ == "__main__":
    main()
