# SPDX-License-Identifier: Apache-2.0
"""Prints README's sentence on speed and its table of costs, or writes them there.

The figures come from the files in benchmarks/results/: the newest run of
`bench_engine.py`, and the newest run of `bench_kernels.py` at all shapes. `--write`
updates README.md; a test compares both.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "README.md"
BEGIN, END = "<!-- costs: begin -->", "<!-- costs: end -->"
SPEED_BEGIN, SPEED_END = "<!-- speed: begin -->", "<!-- speed: end -->"

Row = dict[str, Any]
CONTROL = "stock again"
MODES = {
    "idle": "configured, idle",
    "one site": "one site, every request fully reconstructed",
    "four sites": "four sites",
    CONTROL: "a second engine of stock vLLM, started last (the control)",
}
BATCHES = (1, 64, 256)


def results() -> list[Row]:
    """The result file of each card."""
    files = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    return [json.loads(file.read_text()) for file in files]


def engine_run() -> Row:
    """The results of the card whose engines were measured last."""
    runs = [run for run in results() if "engine" in run]
    return max(runs, key=lambda run: run["engine_environment"]["date"])


def kernel_run() -> Row:
    """The newest results of a card on which the kernels were measured at all shapes."""
    shapes = [
        (len({row["shape"] for row in run["kernel"] if row["case"] == "jumprelu"}), run)
        for run in results()
        if "kernel" in run
    ]
    most = max(count for count, _ in shapes)
    return max((run for n, run in shapes if n == most), key=lambda run: run["date"])


def kernel_rows(rows: list[Row]) -> list[tuple[str, str]]:
    """What an op costs, for each shape that was measured."""
    by_case: dict[tuple[str, str], dict[int, Row]] = {}
    for row in rows:
        by_case.setdefault((row["case"], row["shape"]), {})[row["tokens"]] = row
    lines = []
    for (case, shape), found in by_case.items():
        if case != "jumprelu":
            continue
        ratios = [row["ratio"] for row in found.values()]
        times = " and ".join(
            f"{found[t]['us']:.0f} µs for {t}" for t in (1, 256) if t in found
        )
        idle = by_case.get(("idle", shape), {}).get(256)
        unused = f"; {idle['us']:.0f} µs where no token is steered" if idle else ""
        width, most = shape.replace("x", " × "), max(found)
        what = f"one site, SAE {width}, {min(found)} to {most} tokens"
        floor = f"{min(ratios):.2f} to {max(ratios):.2f} × the hardware's floor"
        lines.append((what, f"{floor} ({times}{unused})"))
    cheap = {case: list(rows.values())[0] for (case, _), rows in by_case.items()}
    if "delta_absolute" in cheap and "additive" in cheap:
        what = "eight delta clamps, 256 tokens × 3584; one steering vector"
        both = (
            f"{cheap['delta_absolute']['us']:.1f} µs; {cheap['additive']['us']:.1f} µs"
        )
        lines.append((what, both))
    return lines


def engine_rows(rows: list[Row]) -> list[tuple[str, str]]:
    """What a whole engine keeps of stock's speed, by the time on the GPU."""
    share = {
        (row["mode"], row["phase"], row["batch"]): row["ratio_gpu"]
        for row in rows
        if row.get("ratio_gpu") is not None
    }
    batches = " / ".join(map(str, BATCHES))
    decode, prefill = f"decode at batch {batches}", "prefill of 8 × 1024 tokens"
    model = "Gemma-2-2B's shape, SAEs 16384 × 2304"
    shares = "share of stock vLLM's speed, by GPU time:"
    lines = [(f"{model}; {decode}, and {prefill}", shares)]
    for mode, what in MODES.items():
        if mode == CONTROL and (mode, "prefill", 8) not in share:
            continue  # an older run has none
        prefill = f"{100 * share[mode, 'prefill', 8]:.1f}"
        lines.append((f"– {what}", f"{decode_shares(rows, mode)} %; {prefill} %"))
    return lines


def decode_shares(rows: list[Row], mode: str) -> str:
    """Shares of stock's decoding speed at the batches, by the time on the GPU."""
    share = {
        row["batch"]: row["ratio_gpu"]
        for row in rows
        if row["mode"] == mode and row["phase"] == "decode"
    }
    return " / ".join(f"{100 * share[batch]:.1f}" for batch in BATCHES)


def speed() -> str:
    """What an engine keeps of stock's decoding speed, as a sentence of Markdown."""
    run = engine_run()
    steered, idle = (decode_shares(run["engine"], m) for m in ("one site", "idle"))
    gpu, batches = run["engine_environment"]["gpu"], " / ".join(map(str, BATCHES))
    text = (
        f"**Fast.** On one {gpu}, a model of Gemma-2-2B's shape decodes at {steered} % "
        f"of stock vLLM's speed (batch {batches}, GPU time) while "
        "every request is fully reconstructed at one site, and at "
        f"{idle} % while none is steered. [All "
        "figures](#what-it-costs), and a [comparison](docs/peers.md)."
    )
    return textwrap.fill(text, 120)


def table() -> str:
    """The table as Markdown, with the run that it is of."""
    run, kernels = engine_run(), kernel_run()
    engine = run["engine_environment"]
    where = (
        f"Kernels: one {kernels['gpu']}, torch {kernels['torch']}, commit "
        f"{kernels['commit']}, {kernels['date']}. Engines: one {engine['gpu']}, torch "
        f"{engine['torch']}, commit {engine['commit']}, {engine['date']}."
    )
    if any(row["mode"] == CONTROL for row in run["engine"]):
        where += (
            " Differences as large as the control's are between engines and not of "
            "steering."
        )
    rows = [*kernel_rows(kernels["kernel"]), *engine_rows(run["engine"])]
    lines = ["| what | cost |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)]
    return "\n".join([where, "", *lines])


def main() -> None:
    """Print or write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--write", action="store_true", help=f"update {PAGE}")
    if not parser.parse_args().write:
        print(f"{speed()}\n\n{table()}")
        return
    page = PAGE.read_text()
    for begin, end, text in (
        (SPEED_BEGIN, SPEED_END, speed()),
        (BEGIN, END, table()),
    ):
        before, rest = page.split(begin)
        page = f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}"
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
