# SPDX-License-Identifier: Apache-2.0
"""What steering costs a whole engine: decode and prefill, against stock vLLM.

    python benchmarks/bench_engine.py [--out FILE] [--budget SECONDS]
        [--engines stock,one] [--batches 64,prefill] [--hurry]

A model of Gemma-2-2B's shape with dummy weights in bfloat16, and JumpReLU SAEs
(16384 x 2304) of which about 100 features fire per token. Stages, each a process:

- eager: sets the thresholds, counts what fires, and measures vLLM without graphs;
- engines: stock, one-site and four-site engines live in one process and take turns
  batch by batch, so that the machine's noise affects all of them equally. A second
  stock engine, started last, is the control: what two equal engines differ by. If it
  is asked for, `twins` is a one-site engine with graphs without steering
  (`VLLM_STEERING_IDLE_GRAPHS=1`);
- hf: Hugging Face `generate` with a forward hook;
- alone-*: an engine that the shared process could not start or keep, by itself.

With `--hurry` the eager engine is not timed, and the others start beside it, each in a
process of its own; they still take turns.
Results are written after every measurement. So what a stage has measured is kept if it
fails or runs out of time. `engine_stages.py` has the stages, `engine_timing.py` the two
clocks. `ratio` is the share of stock's tokens per second, `ratio_gpu` that of its GPU
time per step.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine_stages import (
    ALL_BATCHES,
    BATCHES,
    HF_BATCH,
    HF_MODE,
    Asked,
    Row,
    run_stage,
)
from facts import results_file

TOGETHER = ("stock", "one", "four", "again")
EAGER_SECONDS = 100  # at most
GRACE_SECONDS = 15.0  # after a stage's end, until it is killed
HF_SECONDS = 45  # kept free of the budget for the last stage

# mode, phase, batch -> the shares of stock's speed wanted: by the host's clock,
# and by the time on the GPU.
TARGETS: dict[tuple[str, str, int], tuple[float, float]] = {
    **{("idle", "decode", batch): (0.995, 0.995) for batch in BATCHES},
    **{("idle with twins", "decode", batch): (0.999, 0.999) for batch in BATCHES},
    ("one site", "decode", 1): (0.98, 0.99),
    ("one site", "decode", 64): (0.98, 0.987),
    ("one site", "decode", 256): (0.98, 0.988),
    ("one site", "prefill", 8): (0.96, 0.98),
    **{("four sites", "decode", batch): (0.94, 0.96) for batch in BATCHES},
}
HF_TARGET = 20.0


class Bench:
    """Runs stages, merges their rows, and writes the result file after each."""

    def __init__(
        self,
        root: Path,
        out: Path | None,
        budget: float,
        engines: Sequence[str],
        batches: Sequence[str],
        hurry: bool,
    ):
        self.root, self.out, self.hurry = root, out, hurry
        self.engines, self.batches = engines, batches
        self.end = time.time() + budget
        self.rows: list[Row] = []
        self.environment: Row = {}
        self.stages: dict[str, Row] = {}

    def run(self, stage: str, end: float) -> None:
        """Run one stage; it is told to be done by `end`, and killed soon after."""
        self.finish(stage, self.start(stage, end), end)

    def start(self, stage: str, end: float) -> subprocess.Popen[bytes] | None:
        """Start one stage; None if there is no time for it."""
        self.stages[stage] = {"begin": time.time()}
        if end - time.time() < 15:
            return None
        command = [sys.executable, __file__, "--stage", stage]
        command += ["--root", str(self.root), "--deadline", str(end)]
        command += ["--engines", ",".join(self.engines)]
        command += ["--batches", ",".join(self.batches)]
        command += ["--hurry"] if self.hurry else []
        return subprocess.Popen(
            command, env=dict(os.environ, VLLM_ENABLE_V1_MULTIPROCESSING="0")
        )

    def finish(
        self, stage: str, process: subprocess.Popen[bytes] | None, end: float
    ) -> None:
        """Wait for a stage, and take its rows."""
        ended = "no time left"
        if process is not None:
            try:
                ended = f"exit {process.wait(end - time.time() + GRACE_SECONDS)}"
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                ended = "timeout"
        seconds = round(time.time() - self.stages[stage]["begin"])
        self.stages[stage] = {"seconds": seconds, "ended": ended}
        print(f"stage {stage}: {self.stages[stage]}", flush=True)
        self.merge(self.root / f"{stage}.json")
        self.write()

    def run_together(self, stages: dict[str, float]) -> None:
        """Run stages side by side; each with its own end."""
        started = {stage: self.start(stage, end) for stage, end in stages.items()}
        for stage, process in started.items():
            self.finish(stage, process, stages[stage])

    def merge(self, path: Path) -> None:
        """Take the rows of a stage, unless an earlier stage has measured the same."""
        if not path.exists():
            return
        content = json.loads(path.read_text())
        self.environment = content["environment"]
        have = {key(row) for row in self.rows}
        self.rows += [row for row in content["rows"] if key(row) not in have]
        add_ratios(self.rows)

    def missing(self) -> list[str]:
        """Engines with a mode that the shared process has not measured everywhere."""
        from engine_modes import MODES

        have = [row["mode"] for row in self.rows if "phase" in row]
        want = len(self.batches)
        return [
            name
            for name in self.engines
            if any(have.count(mode) < want for mode in MODES[name])
        ]

    def write(self) -> None:
        """Put the rows into the result file, beside what else is there."""
        if not self.environment:
            return
        out = self.out or results_file(self.environment["gpu"])
        out.parent.mkdir(parents=True, exist_ok=True)
        found = json.loads(out.read_text()) if out.exists() else {}
        found["engine"] = self.rows
        found["engine_targets"] = targets(self.rows)
        found["engine_environment"] = {**self.environment, "stages": self.stages}
        out.write_text(json.dumps(found, indent=1) + "\n")


def key(row: Row) -> tuple[Any, ...]:
    """What a row measured."""
    names = ("mode", "phase", "batch", "module", "layer")
    return tuple(row.get(name) for name in names)


def add_ratios(rows: list[Row]) -> None:
    """Shares of stock for rows whose engine took no turns with the stock engine."""
    base = {key(row)[1:]: row for row in rows if row["mode"] == "stock"}
    for row in rows:
        stock = base.get(key(row)[1:])
        if stock and "ratio" not in row:
            row["ratio"] = round(row["tokens_per_s"] / stock["tokens_per_s"], 4)
            if "step_ms_gpu" in row and "step_ms_gpu" in stock:
                row["ratio_gpu"] = round(stock["step_ms_gpu"] / row["step_ms_gpu"], 4)


def targets(rows: list[Row]) -> list[Row]:
    """Every target beside what was measured for it, by both clocks."""
    at = {(row["mode"], row.get("phase"), row.get("batch")): row for row in rows}
    found: list[Row] = []
    for (mode, phase, batch), shares in TARGETS.items():
        row = at.get((mode, phase, batch), {})
        entry: Row = {"mode": mode, "phase": phase, "batch": batch}
        for clock, wanted in zip(("", "_gpu"), shares, strict=True):
            name = f"ratio{clock}"
            entry |= {f"wanted{clock}": wanted, name: row.get(name)}
            entry[f"met{clock}"] = row[name] >= wanted if name in row else None
        found.append(entry)
    ours = at.get(("one site", "decode", HF_BATCH))
    theirs = at.get((HF_MODE, "decode", HF_BATCH))
    if ours and theirs:
        times = round(ours["tokens_per_s"] / theirs["tokens_per_s"], 2)
        entry = {"mode": "one site over hugging face", "phase": "decode"}
        entry |= {"batch": HF_BATCH, "wanted": HF_TARGET, "ratio": times}
        found.append({**entry, "met": times >= HF_TARGET})
    return found


def some_of(names: tuple[str, ...], more: tuple[str, ...] = ()) -> dict[str, Any]:
    """`add_argument` options of a choice of names, between commas; default: `names`."""

    listed = ",".join((*names, *more))

    def split(given: str) -> tuple[str, ...]:
        chosen = tuple(given.split(","))
        if unknown := [name for name in chosen if name not in (*names, *more)]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {listed}")
        return chosen

    return {"type": split, "default": names, "help": f"some of {listed}"}


def main() -> None:
    """Run the stages one after another; print what came out and how long it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="default: results/<gpu>.json")
    parser.add_argument("--budget", type=float, default=600, help="seconds for all")
    parser.add_argument("--root", type=Path, help="working directory")
    parser.add_argument("--engines", **some_of(TOGETHER, ("twins",)))
    parser.add_argument("--batches", **some_of(ALL_BATCHES))
    parser.add_argument("--no-hf", action="store_true", help="no Hugging Face stage")
    parser.add_argument("--hurry", action="store_true", help="no timed eager engine")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        asked = Asked(args.engines, args.batches, args.hurry)
        run_stage(args.stage, args.root, args.deadline, asked)
    whole = (args.engines, args.batches, args.no_hf) == (TOGETHER, ALL_BATCHES, False)
    if not whole and not args.out:
        parser.error("a part of the benchmark needs --out: results/ holds whole runs")
    root = args.root or Path(tempfile.mkdtemp(prefix="bench-engine-"))
    from engine_modes import CONFIG

    (root / "model").mkdir(parents=True, exist_ok=True)
    (root / "model" / "config.json").write_text(json.dumps(CONFIG))
    bench = Bench(root, args.out, args.budget, args.engines, args.batches, args.hurry)
    engines_end = bench.end - (0 if args.no_hf else HF_SECONDS)
    eager_end = min(time.time() + EAGER_SECONDS, engines_end)
    if args.hurry:
        bench.run_together({"eager": eager_end, "engines": engines_end})
    else:
        bench.run("eager", eager_end)
        bench.run("engines", engines_end)
    if not args.no_hf:
        bench.run("hf", bench.end)
    for name in bench.missing():
        bench.run(f"alone-{name}", bench.end)
    for row in [*bench.rows, *targets(bench.rows)]:
        print(row)
    print(bench.stages)


if __name__ == "__main__":
    main()
