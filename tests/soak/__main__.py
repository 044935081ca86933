# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.soak`: a long soak, on a CPU or a GPU; status 1 on any fault."""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import tests.conftest  # noqa: F401  engines in this process

# Where the helpers are; pytest knows it from pyproject.toml.
sys.path.insert(0, str(Path(__file__).parents[1]))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="of all engines")
    parser.add_argument("--requests", type=int, default=1 << 30, help="stop earlier")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--profiles", nargs="+", help="engines, by name")
    parser.add_argument("--distinct", type=int, default=300, help="requests to draw")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--model", default="llama", help="family of the tiny model")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tolerance", type=float, help="of log-probabilities")
    parser.add_argument("--margin", type=float, help="of a reference's tokens")
    parser.add_argument(
        "--deadline", type=float, default=math.inf, help="seconds in all"
    )
    parser.add_argument("--graphs", action="store_true", help="compile and capture")
    parser.add_argument("--gpu", action="store_true", help="what a GPU engine needs")
    return parser.parse_args()


# Float32 attention exists in Triton only, in TF32.
GPU_OPTIONS: dict[str, Any] = {"attention_backend": "TRITON_ATTN"}
CAPTURED = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
GRAPH_OPTIONS: dict[str, Any] = {
    "enforce_eager": False,
    "cudagraph_metrics": True,
    "compilation_config": {"cudagraph_capture_sizes": CAPTURED},
}


def main() -> int:
    from soak.choices import UNITS
    from soak.over_http import run as run_over_http
    from soak.report import summary
    from soak.soak import PROFILES, Plan, run

    args = arguments()
    options: dict[str, Any] = {"dtype": args.dtype}
    if args.gpu:
        options |= GPU_OPTIONS
    if args.graphs:
        options |= GRAPH_OPTIONS
    exact = not args.gpu and args.dtype == "float32"
    arithmetic = "exact" if exact else "tf32" if args.dtype == "float32" else "bfloat16"
    plan = Plan(
        seed=args.seed,
        seconds=60 * args.minutes,
        requests=args.requests,
        profiles=args.profiles or tuple(PROFILES),
        distinct=args.distinct,
        concurrency=args.concurrency,
        model=args.model,
        block_size=16 if args.gpu else 32,
        tolerance=args.tolerance or (1e-3 if exact else 2e-2),
        margin=args.margin or (5e-3 if exact else 4e-2),
        unit=UNITS[arithmetic],
        batched_tokens=4 * args.concurrency,
        repeats=not exact,
        options=options,
        deadline=args.deadline,
    )
    with tempfile.TemporaryDirectory() as root:
        # Two thirds of a CPU's time belong to engines in this process.
        over_http = not args.gpu and args.profiles is None
        if over_http:
            plan.seconds *= 2 / 3
        reports = run(plan, Path(root))
        if over_http:
            seconds, distinct = plan.seconds / 2, args.distinct // 2
            reports.append(
                run_over_http(
                    Path(root).resolve() / "http",
                    Path(root),
                    args.seed,
                    seconds,
                    args.requests,
                    distinct,
                )
            )
    print(summary(reports), flush=True)
    return int(any(report.failed for report in reports))


if __name__ == "__main__":
    sys.exit(main())
