# SPDX-License-Identifier: Apache-2.0
"""What conditions and spans cost a whole engine: decoding, beside the same clamps.

    python benchmarks/bench_requests.py --out FILE [--budget SECONDS]
        [--batches 1,64,256]

The model and the SAE of `bench_engine.py` (Gemma-2-2B's shape, one site of
16384 x 2304, about 100 features a token). One engine serves the modes in turns; in
each, every request has four clamps:

- `delta`, `full`: as they are, on every token;
- `delta, more`, `full, more`: each with a condition, two of them distinct, and the
  answer divided into six spans, which the requests pass through while they are timed.

`ratio` is the share of the plain clamps' tokens per second by the host's clock,
`ratio_gpu` of their GPU time a step. At least 0.997 is wanted.
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

from bench_readout import calibrate, start_engine
from facts import environment

ROUNDS = 24
BATCHES = ("64", "256", "1")
WANTED = 0.997
KEYS = {
    "delta": "sae_clamp_specs",
    "full": "sae_full_reconstruction_specs",
}
# Places of the answer where another piece begins.
PLACES = (0, 8, 16, 24, 32, 40, None)


def clamps(conditional: bool, value: float) -> list[dict[str, Any]]:
    """Four clamps; with a condition, some of which hold on any token."""
    found: list[dict[str, Any]] = []
    for at in range(4):
        clamp: dict[str, Any] = {"feature_idx": 11 + at, "kind": "absolute"}
        clamp["value"] = value + at
        if conditional:
            clamp["when"] = {"feature_idx": 101 + at % 2, "below": 1.0}
        found.append(clamp)
    return found


def specs(tier: str, more: bool) -> dict[str, Any]:
    """What the requests of a mode ask for."""
    if not more:
        return {KEYS[tier]: [{"module_name": "sae", "clamps": clamps(False, 1.0)}]}
    made = [
        {
            "module_name": "sae",
            "clamps": clamps(True, 1.0 + at),
            "spans": [{"of": "generated", "start": start, "stop": stop}],
        }
        for at, (start, stop) in enumerate(zip(PLACES, PLACES[1:], strict=False))
    ]
    prompt = [{"of": "prompt", "start": 0, "stop": None}]
    first = {"module_name": "sae", "clamps": clamps(True, 0.5), "spans": prompt}
    return {KEYS[tier]: [first, *made]}


def measure(root: Path, deadline: float, batches: Sequence[str], out: Path) -> None:
    """Start the engine and let the modes take turns; write after every batch."""
    from engine_timing import Mode, interleave, summarize
    from engine_windows import decode_window

    engine = start_engine(root, False)
    modes = [
        Mode(tier + ", more" * more, engine, specs(tier, more))
        for tier in KEYS
        for more in (False, True)
    ]
    rows: list[dict[str, Any]] = []
    for done, asked in enumerate(batches):
        until = time.time() + (deadline - time.time()) / (len(batches) - done)
        batch = int(asked)

        def window(mode: Any, seed: int, batch: int = batch) -> Any:
            return decode_window(mode, batch, seed)

        found = interleave(modes, window, ROUNDS, until)
        for tier in KEYS:
            pair = {name: found[name] for name in found if name.startswith(tier)}
            rows += summarize(pair, "decode", batch, batch, tier)
        content = {
            "requests": rows,
            "requests_targets": targets(rows),
            "requests_environment": environment(),
        }
        out.write_text(json.dumps(content, indent=1) + "\n")
        for row in rows[-len(found) :]:
            print(row, flush=True)
    for row in targets(rows):
        print(row, flush=True)
    sys.stdout.flush()
    # Tearing down an engine takes time, and is of no use here.
    os._exit(0)


def targets(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is wanted beside what was measured, by the GPU's clock and the host's."""
    return [
        {
            "mode": row["mode"],
            "batch": row["batch"],
            "clock": clock,
            "wanted": WANTED,
            "found": row[clock],
            "met": row[clock] >= WANTED,
        }
        for row in rows
        for clock in ("ratio_gpu", "ratio")
        if row["mode"] not in KEYS and clock in row
    ]


def main() -> None:
    """Calibrate in one process, measure in another."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=400, help="seconds for all")
    parser.add_argument("--root", type=Path, help="working directory")
    parser.add_argument("--batches", default=",".join(BATCHES))
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.deadline:
        measure(args.root, args.deadline, args.batches.split(","), args.out)
        return
    begin = time.time()
    root = args.root or Path(tempfile.mkdtemp(prefix="bench-requests-"))
    calibrate(root)
    command = [sys.executable, __file__, "--root", str(root)]
    command += ["--out", str(args.out), "--batches", args.batches]
    command += ["--deadline", str(begin + args.budget)]
    env = dict(os.environ, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    subprocess.run(command, env=env, check=True)


if __name__ == "__main__":
    main()
