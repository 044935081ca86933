# SPDX-License-Identifier: Apache-2.0
"""What reading features costs a whole engine: decode and prefill, against idle.

    python benchmarks/bench_readout.py --out FILE [--budget SECONDS]
        [--batches 1,64,256,prefill] [--modes off,off again,idle,reading,one site,both]
        [--rounds 64] [--steps 12]

The model and the SAE of `bench_engine.py` (Gemma-2-2B's shape, one site of
16384 x 2304, about 100 features a token). Two engines live in one process and take
turns, one that may read and one that was started with `readout: false`:

- `off`: no request reads, and none could;
- `off again`: the same on one more engine, if asked for: what two engines differ by;
- `idle`: no request reads;
- `reading`: every request reads its 16 largest activations of every token;
- `one site`: every request is fully reconstructed;
- `both`: reconstructed and read.

`ratio` is the share of idle's tokens per second by the host's clock, `ratio_gpu` of its
GPU time a step; those of `both` are of `one site`. The turns are short, so that a noisy
host treats all modes alike. `ratio_p10` compares the quietest tenth of the steps.

`host_extra_ms` is what a mode adds to the host's own work in a step (`HostProbe` in
`engine_timing.py`; in a prefill, admission too). `ratio_host` is the share of the speed
that is left if the GPU hides none of it: the baseline's wall / (wall + host_extra_ms).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from facts import environment

ROUNDS = 64
STEPS = 12
CALIBRATION_SECONDS = 150  # at most
PREFILL = "prefill"
BATCHES = ("64", "256", "1", PREFILL)
READ = [{"module_name": "sae", "top_k": 16}]
# (mode, phase, clock) -> the share of its baseline's tokens per second that is wanted
TARGETS = {
    ("idle", "decode", "ratio_gpu"): 0.995,
    ("reading", "decode", "ratio_gpu"): 0.97,
    ("reading", "decode", "ratio"): 0.95,
    ("both", "decode", "ratio_gpu"): 0.99,
    ("reading", PREFILL, "ratio"): 0.92,
}
MODES = ("off", "idle", "reading", "one site", "both")
BASELINES = {
    "off again": "off",
    "idle": "off",
    "reading": "idle",
    "one site": "idle",
    "both": "one site",
}

Row = dict[str, Any]


def start_engine(root: Path, readout: bool) -> Any:
    """An engine with the module of one site."""
    from engine_modes import ENGINE_OPTIONS, GRAPHS, model_runner, spread_embeddings
    from engine_timing import Engine, HostProbe, StepProbe

    from vllm import LLM

    steering = {"modules": {"sae": str(root / "one")}, "readout": readout}
    llm = LLM(
        str(root / "model"),
        additional_config={"steering": steering},
        **ENGINE_OPTIONS,
        **GRAPHS,
    )
    runner = model_runner(llm)
    spread_embeddings(runner.get_model())
    return Engine(llm, StepProbe(runner), HostProbe(llm, runner))


def modes(root: Path, names: Sequence[str]) -> list[Any]:
    """The modes of these names, each on its engine."""
    from engine_modes import CLAMP, FULL_KEY
    from engine_timing import Mode

    # Engines without reading, one before the one with it and one after.
    off = start_engine(root, False) if "off" in names else None
    on = start_engine(root, True)
    again = start_engine(root, False) if "off again" in names else None
    full = [{"module_name": "sae", "clamps": [CLAMP]}]
    every = [
        *([] if off is None else [Mode("off", off, None)]),
        *([] if again is None else [Mode("off again", again, None)]),
        Mode("idle", on, None),
        Mode("reading", on, {"sae_readout_specs": READ}),
        Mode("one site", on, full),
        Mode("both", on, {"sae_readout_specs": READ, FULL_KEY: full}),
    ]
    return [mode for mode in every if mode.name in names]


def rows_of(found: dict[str, Any], phase: str, batch: int, tokens: int) -> list[Row]:
    """One row a mode, each beside its own baseline."""
    from engine_timing import summarize

    rows = []
    for mode in found:
        base = BASELINES.get(mode, mode)
        base = base if base in found else mode
        pair = {name: found[name] for name in (base, mode) if name in found}
        both = {row["mode"]: row for row in summarize(pair, phase, batch, tokens, base)}
        row = both[mode]
        extra = host_extra(found[base], found[mode])
        wall, key = both[base]["step_ms_wall"], "step_ms_wall_p10"
        row |= {
            "baseline": base,
            "ratio_p10": round(both[base][key] / row[key], 4),
            "host_extra_ms": round(extra, 4),
            "ratio_host": round(wall / (wall + extra), 4),
        }
        rows.append(row)
    return rows


def host_extra(base: Sequence[Any], windows: Sequence[Any]) -> float:
    """The median over the rounds of what a mode adds to the host's work, in ms."""
    median = statistics.median
    return median(
        median(own.host) - median(other.host)
        for other, own in zip(base, windows, strict=False)
    )


def measure(args: argparse.Namespace) -> None:
    """Start the engines and let the modes take turns; write after every batch."""
    batches = args.batches.split(",")
    from engine_modes import PREFILL_COUNT, PREFILL_LENGTH
    from engine_timing import interleave
    from engine_windows import decode_window, prefill_window

    compared = modes(args.root, args.modes.split(","))
    rows: list[Row] = []
    for done, asked in enumerate(batches):
        left = args.deadline - time.time()
        until = time.time() + left / (len(batches) - done)
        if asked == PREFILL:
            phase, batch = PREFILL, PREFILL_COUNT
            tokens = PREFILL_COUNT * PREFILL_LENGTH
            found = interleave(compared, prefill_window, args.rounds, until)
        else:
            phase, batch = "decode", int(asked)
            tokens = batch

            def window(mode: Any, seed: int, batch: int = batch) -> Any:
                return decode_window(mode, batch, seed, args.steps, args.steps // 2)

            found = interleave(compared, window, args.rounds, until)
        rows += rows_of(found, phase, batch, tokens)
        content = {
            "readout": rows,
            "readout_targets": targets(rows),
            "readout_environment": environment(),
        }
        args.out.write_text(json.dumps(content, indent=1) + "\n")
        for row in rows[-len(found) :]:
            print(row, flush=True)
    for row in targets(rows):
        print(row, flush=True)
    sys.stdout.flush()
    # Tearing down several engines takes time and has no use here.
    os._exit(0)


def targets(rows: Sequence[Row]) -> list[Row]:
    """Every target beside what was measured for it, where its baseline was."""
    return [
        {
            **{name: row[name] for name in ("mode", "phase", "batch")},
            "clock": clock,
            "wanted": wanted,
            "found": row.get(clock),
            "met": row[clock] >= wanted if clock in row else None,
        }
        for (mode, phase, clock), wanted in TARGETS.items()
        for row in rows
        if (row["mode"], row["phase"]) == (mode, phase) and row["baseline"] != mode
    ]


def calibrate(root: Path) -> None:
    """Make the SAE, with the thresholds that `bench_engine.py` finds."""
    from engine_modes import CONFIG

    (root / "model").mkdir(parents=True, exist_ok=True)
    (root / "model" / "config.json").write_text(json.dumps(CONFIG))
    command = [sys.executable, str(Path(__file__).with_name("bench_engine.py"))]
    deadline = time.time() + CALIBRATION_SECONDS
    command += ["--stage", "eager", "--root", str(root), "--deadline", str(deadline)]
    command += ["--engines", "stock", "--batches", "1"]
    env = dict(os.environ, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    subprocess.run(command, env=env, check=True)


def main() -> None:
    """Calibrate in one process, measure in another."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=540, help="seconds for all")
    parser.add_argument("--root", type=Path, help="working directory")
    parser.add_argument("--batches", default=",".join(BATCHES))
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--steps", type=int, default=STEPS, help="wall steps of a turn")
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.deadline:
        measure(args)
        return
    begin = time.time()
    root = args.root or Path(tempfile.mkdtemp(prefix="bench-readout-"))
    calibrate(root)
    command = [sys.executable, __file__, "--root", str(root)]
    command += ["--out", str(args.out), "--batches", args.batches]
    command += ["--modes", args.modes, "--rounds", str(args.rounds)]
    command += ["--steps", str(args.steps)]
    command += ["--deadline", str(begin + args.budget)]
    env = dict(os.environ, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    subprocess.run(command, env=env, check=True)


if __name__ == "__main__":
    main()
