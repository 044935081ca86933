# SPDX-License-Identifier: Apache-2.0
"""What an SAE costs a tensor-parallel engine: shared by the ranks, and copied.

    python benchmarks/bench_tp.py --tp 4 --shape 27b --out FILE
        [--engines stock,peers,gather] [--batches 1,64,prefill] [--seconds SECONDS]
    python benchmarks/bench_tp.py --dry-run        # a tiny model, on a CPU

A model of the shape with all its layers and dummy weights; about 100 features fire on
each token, others on others (`tp_shapes.py`). Engines start side by side, each in a
process of its own, and then take turns, one at a time:

- `stock`: vLLM without steering;
- `peers`: shared SAEs go through peers' memory. One module of one site is shared, one
  is copied, and one of four sites is shared. Requests choose;
- `gather`: shared SAEs go through vLLM's all-gather. One module of one site;
- `peers+twins`, `gather+twins`: the same, with CUDA graphs without steering for idle
  steps.

Each round measures every mode once. `gpu` is the time of a step on the GPU, without
launch gaps (`tp_worker.py`), `between` and `host` the time from one step to the next on
the GPU and on the host. `ratio` is the baseline's time over the mode's, the median of
the rounds: an idle engine's baseline is `stock`, that of a steered mode is its own
engine when idle. If `between` is longer than `gpu`, the step waits for the host.

`--merge FILE...` puts results into `benchmarks/results/` and measures nothing.

With `--hold FILE`, the engines wait until the file exists before they start, and with
`--wait FILE` before they measure.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from facts import environment, results_file
from tp_engine import PROMPT, Profile, Turn
from tp_processes import MODULES, Engine, await_file, start_engines, wait_for
from tp_shapes import SHAPES

PREFILL = "prefill"
PREFILL_COUNT, PREFILL_LENGTH = 8, 1024
CLOCKS = ("gpu", "between", "host")
ANSWER_S = 180  # the longest that a turn may take
LEAST_S, LAST_S = 25, 8  # to measure, and for a round that has begun
PROFILE_S = 20

Row = dict[str, Any]
Window = dict[str, list[float]]

# shape -> (mode, phase and batch) -> the share of its baseline's speed that is wanted
TARGETS: dict[str, dict[tuple[str, str], float]] = {
    "27b": {
        ("peers one shared", "1"): 0.985,
        ("peers one shared", "64"): 0.975,
        ("peers one shared", PREFILL): 0.96,
        ("peers four shared", "1"): 0.95,
        ("peers four shared", "64"): 0.95,
        ("peers idle", "1"): 0.997,
        ("peers idle", "64"): 0.997,
        ("peers idle", PREFILL): 0.997,
    },
    "70b": {
        ("peers one shared", "1"): 0.99,
        ("peers one shared", "64"): 0.98,
    },
}


@dataclass(frozen=True)
class Mode:
    """What is compared: an engine, and the module that its requests use."""

    name: str
    engine: Engine
    module: str | None
    baseline: str | None


def modes_of(engines: list[Engine]) -> list[Mode]:
    """Stock, each engine when idle, and each of its modules."""
    stock = "stock" if any(engine.name == "stock" for engine in engines) else None
    modes = []
    for engine in engines:
        if engine.name == "stock":
            modes.append(Mode("stock", engine, None, None))
            continue
        idle = f"{engine.name} idle"
        modes.append(Mode(idle, engine, None, stock))
        for module in engine.facts["engine"]["modules"]:
            modes.append(Mode(f"{engine.name} {module}", engine, module, idle))
    return modes


def take_turns(
    modes: list[Mode],
    turn: dict[str, Any],
    rounds: range,
    deadline: float,
    found: dict[str, list[Window]],
) -> None:
    """Every mode once a round, each round beginning with another; into `found`.

    Rounds before the round 0 warm up. After the deadline no round begins.
    """
    for at in rounds:
        if time.time() > deadline:
            return
        first = at % len(modes)
        for mode in [*modes[first:], *modes[:first]]:
            if mode.engine.failed:
                continue
            try:
                mode.engine.pipe.send(Turn(module=mode.module, seed=at, **turn))
                window = mode.engine.answer(ANSWER_S)
            except (RuntimeError, OSError) as error:
                print(str(error)[-1500:], flush=True)
                mode.engine.failed = True
                continue
            if at >= 0:
                found.setdefault(mode.name, []).append(window)


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def row_of(
    mode: Mode, found: dict[str, list[Window]], asked: str, wanted: float | None
) -> Row:
    """Times and shares of a mode, from windows of the same rounds."""
    windows = found[mode.name]
    row: Row = {"mode": mode.name, "batch": asked, "rounds": len(windows)}
    for clock in CLOCKS:
        steps = [ms for window in windows for ms in window[clock]]
        if not steps:
            continue
        low, middle, high = (round(ms, 4) for ms in quartiles(steps))
        row |= {f"{clock}_ms": middle, f"{clock}_p25": low, f"{clock}_p75": high}
        row[f"{clock}_steps"] = len(steps)
        if mode.baseline not in found:
            continue
        pairs = [
            (statistics.median(base[clock]), statistics.median(own[clock]))
            for base, own in zip(found[mode.baseline], windows, strict=False)
        ]
        low, middle, high = quartiles([base / own for base, own in pairs])
        name = "ratio" if clock == "gpu" else f"ratio_{clock}"
        row |= {name: round(middle, 4), f"{name}_p25": round(low, 4)}
        row[f"{name}_p75"] = round(high, 4)
        extra = statistics.median(own - base for base, own in pairs)
        row[f"{clock}_extra_us"] = round(1e3 * extra, 1)
    if "ratio" in row:
        row["baseline"] = mode.baseline
    if wanted is not None and "ratio" in row:
        row |= {"wanted": wanted, "met": row["ratio"] >= wanted}
    return row


def line_of(row: Row) -> str:
    """A row to read."""
    text = f"{row['batch']:>7} {row['mode']:<18}"
    for clock in CLOCKS:
        if f"{clock}_ms" in row:
            text += f" {clock} {row[f'{clock}_ms']:8.3f}"
    if "ratio" in row:
        spread = f"{100 * row['ratio_p25']:.2f}..{100 * row['ratio_p75']:.2f}"
        text += f" | {100 * row['ratio']:6.2f} % ({spread}) of {row['baseline']}"
        text += f", {row['gpu_extra_us']:+.0f} us"
    if "ratio_between" in row:
        text += f", between {100 * row['ratio_between']:.2f} %"
    if "wanted" in row:
        text += f", wanted {100 * row['wanted']:.1f}" + " met" * row["met"]
    return text


def turn_of(args: argparse.Namespace, asked: str) -> dict[str, Any]:
    """A batch's part of `Turn`."""
    if asked != PREFILL:
        return {"batch": int(asked), "length": PROMPT, "steps": args.steps}
    length = 64 if args.dry_run else PREFILL_LENGTH
    return {"batch": PREFILL_COUNT, "length": length, "steps": 0}


def measure(
    args: argparse.Namespace, engines: list[Engine], deadline: float
) -> list[Row]:
    """All batches in several passes; rows are printed and written after each."""
    modes = modes_of(engines)
    found: dict[str, dict[str, list[Window]]] = {asked: {} for asked in args.batches}
    rows: dict[tuple[str, str], Row] = {}
    for done in range(args.passes):
        begin = done * args.rounds
        for asked in args.batches:
            rounds = range(begin if done else -1, begin + args.rounds)
            windows = found[asked]
            take_turns(modes, turn_of(args, asked), rounds, deadline, windows)
            for mode in modes:
                if mode.name not in windows:
                    continue
                wanted = TARGETS.get(args.shape, {}).get((mode.name, asked))
                rows[mode.name, asked] = row_of(mode, windows, asked, wanted)
            if args.out is not None:
                write(args, engines, list(rows.values()))
            print(f"-- pass {done + 1}", flush=True)
            for (_, batch), row in rows.items():
                if batch == asked:
                    print(line_of(row), flush=True)
        if time.time() > deadline:
            break
    return list(rows.values())


def profile(modes: list[Mode], batch: int) -> None:
    """Print the kernels that a mode runs more than its baseline.

    Microseconds are of a step, on average; the first rank's.
    """
    tokens = 33
    found: dict[str, dict[str, tuple[int, float]]] = {}
    for mode in modes:
        if mode.engine.failed:
            continue
        mode.engine.pipe.send(Profile(mode.module, batch, tokens))
        kernels = found[mode.name] = mode.engine.answer(PROFILE_S)
        if mode.baseline not in found:
            continue
        base = found[mode.baseline]
        print(f"-- batch {batch}, {mode.name}: us a step more", flush=True)
        more = {
            name: (us - base.get(name, (0, 0.0))[1]) / tokens
            for name, (_, us) in kernels.items()
        }
        for name in sorted(more, key=lambda name: -abs(more[name]))[:12]:
            count = (kernels[name][0] - base.get(name, (0, 0))[0]) / tokens
            print(f"   {more[name]:+8.2f} {count:+6.2f} times {name[:90]}", flush=True)


def write(args: argparse.Namespace, engines: list[Engine], rows: list[Row]) -> None:
    """The result file."""
    shape = SHAPES[args.shape]
    content = {
        "tp": args.tp,
        "shape": args.shape,
        "model": f"{shape.family}, {shape.layers} layers of {shape.hidden}",
        "sae": f"{shape.features}x{shape.hidden}",
        "l0": shape.l0,
        "engines": {engine.name: engine.facts for engine in engines},
        "rows": rows,
        "environment": args.environment,
    }
    args.out.write_text(json.dumps(content, indent=1) + "\n")


def merge(files: list[Path]) -> None:
    """Put the rows of result files into `benchmarks/results/`, a row a line.

    They replace rows of the same ranks, shape, mode and batch.
    """
    for file in files:
        run = json.loads(file.read_text())
        out = results_file(run["environment"]["gpu"])
        data = json.loads(out.read_text())
        facts = {key: run[key] for key in ("tp", "shape", "sae")}
        when = {key: run["environment"][key] for key in ("commit", "date")}
        key = ("tp", "shape", "mode", "batch")
        rows = {tuple(row[k] for k in key): row for row in data.get("tp_engine", [])}
        for row in run["rows"]:
            row = facts | row | when
            rows[tuple(row[k] for k in key)] = row
        data["tp_engine"] = list(rows.values())
        lines = []
        for name, value in data.items():
            text = json.dumps(value)
            if isinstance(value, list):
                items = ",\n  ".join(json.dumps(item) for item in value)
                text = f"[\n  {items}\n ]"
            lines.append(f" {json.dumps(name)}: {text}")
        out.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def names(text: str) -> list[str]:
    return text.split(",")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--shape", choices=SHAPES, default="27b")
    parser.add_argument("--engines", type=names, default=["stock", "peers"])
    parser.add_argument("--batches", type=names, default=["1", "64", PREFILL])
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3, help="of a pass")
    parser.add_argument("--steps", type=int, default=12, help="of a turn")
    parser.add_argument("--seconds", type=float, default=900, help="for everything")
    parser.add_argument("--modules", type=names, default=list(MODULES))
    parser.add_argument("--kv-gib", type=float, default=3, help="of each rank")
    parser.add_argument("--apart", type=float, default=0, help="seconds between starts")
    parser.add_argument("--profile", type=int, nargs="*", default=[], help="batches")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--root", type=Path, help="folder of model, SAEs and logs")
    parser.add_argument("--hold", type=Path)
    parser.add_argument("--wait", type=Path)
    parser.add_argument("--merge", type=Path, nargs="+", help="result files")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    if args.merge:
        merge(args.merge)
        return
    if args.dry_run:
        args.shape, args.passes, args.rounds, args.steps = "tiny", 1, 1, 2
    deadline = time.time() + args.seconds
    with tempfile.TemporaryDirectory() as directory:
        root = args.root or Path(directory)
        root.mkdir(parents=True, exist_ok=True)
        engines = start_engines(args, root)
        args.environment = {} if args.dry_run else environment()
        engines = wait_for(engines, deadline - LEAST_S)
        if not engines:
            raise SystemExit("no engine started")
        print(f"{deadline - time.time():.0f} s left", flush=True)
        await_file(args.wait)
        last = LAST_S + (PROFILE_S if args.profile else 0)
        rows = measure(args, engines, deadline - last)
        for batch in args.profile:
            try:
                profile(modes_of(engines), batch)
            except (RuntimeError, OSError) as error:
                print(str(error)[-1500:], flush=True)
    if not rows:
        raise SystemExit("nothing was measured")
    for engine in engines:
        engine.process.kill()
    os._exit(0)


if __name__ == "__main__":
    main()
