# SPDX-License-Identifier: Apache-2.0
"""A soak: references from an engine at rest, then engines in any schedule."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soak import pool as requests
from soak.alone import Rounding, answer_alone
from soak.chaos import Chaos, Limits
from soak.choices import UNITS
from soak.report import Report, say
from steering_testing.engine import engine

MAX_MODEL_LEN = 128
# Of a deadline: the share that references may take, seconds that an engine needs to
# start, and seconds for the end of the run.
REFERENCE_SHARE, START_S, END_S = 0.3, 40.0, 15.0
DRAFTS = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_max": 3,
    "prompt_lookup_min": 1,
}
# What each engine does to a schedule. `blocks`: KV blocks for each concurrent request.
PROFILES: dict[str, dict[str, Any]] = {
    "squeezed": {
        "blocks": 1.4,
        "scheduling_policy": "priority",
        "max_num_batched_tokens": 40,
        "async_scheduling": False,
    },
    "ahead": {"blocks": 2.0, "max_num_batched_tokens": 64, "async_scheduling": True},
    "drafts": {
        "blocks": 2.0,
        "max_num_batched_tokens": 96,
        "async_scheduling": False,
        "speculative_config": DRAFTS,
    },
}


@dataclass
class Plan:
    """What to run, and on what.

    Attributes:
        seconds, requests: of all engines together; whichever is reached first.
        distinct: requests in the pool.
        concurrency: requests in a batch.
        tolerance: largest difference of a log-probability.
        margin, unit, repeats: as of `Rounding`.
        options: of every engine.
        deadline: seconds for everything, references and starts of engines included.
        batched_tokens: least tokens of a step, for large batches.
    """

    seed: int = 0
    seconds: float = 60.0
    requests: int = 1 << 30
    profiles: Sequence[str] = tuple(PROFILES)
    distinct: int = 150
    concurrency: int = 12
    model: str = "llama"
    block_size: int = 32
    tolerance: float = 1e-3
    margin: float = 5e-3
    unit: float = UNITS["exact"]
    batched_tokens: int = 0
    steps_per_fault: int = 12
    repeats: bool = False
    options: dict[str, Any] | None = None
    deadline: float = math.inf


def engine_options(plan: Plan, profile: dict[str, Any]) -> dict[str, Any]:
    """vLLM's options for one engine of the plan."""
    options = {**profile, **(plan.options or {})}
    blocks = int(options.pop("blocks") * plan.concurrency)
    per_request = MAX_MODEL_LEN // plan.block_size
    options["num_gpu_blocks_override"] = max(blocks, per_request) + 1
    options["max_num_batched_tokens"] = max(
        options["max_num_batched_tokens"], plan.batched_tokens
    )
    return {
        "block_size": plan.block_size,
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": plan.concurrency,
        "enable_chunked_prefill": True,
        "enable_prefix_caching": True,
        **options,
    }


def run(plan: Plan, root: Path) -> list[Report]:
    """One report for each engine."""
    end = time.monotonic() + plan.deadline
    paths, versions = requests.save(root), requests.save_versions(root)
    steering = {"presets": requests.PRESETS, **requests.OPTIONS}
    pool = requests.make_pool(plan.distinct, plan.seed)
    calm = {"max_model_len": MAX_MODEL_LEN, "block_size": plan.block_size}
    # Eager, so that what each request selects can be seen.
    calm |= {"max_num_seqs": plan.concurrency, **(plan.options or {})}
    calm |= {"enforce_eager": True}
    with engine(plan.model, root, paths, steering, **calm) as llm:
        rounding = Rounding(plan.margin, plan.tolerance, plan.unit, plan.repeats)
        until = time.monotonic() + REFERENCE_SHARE * plan.deadline
        stable = answer_alone(llm, pool, versions, rounding, until)
    limits = Limits(
        seconds=0.0,
        requests=plan.requests // len(plan.profiles),
        concurrency=plan.concurrency,
        tolerance=plan.tolerance,
        steps_per_fault=plan.steps_per_fault,
    )
    reports = []
    for at, name in enumerate(plan.profiles):
        options = engine_options(plan, PROFILES[name])
        # Drafts are checked against the best token only.
        drafts = "speculative_config" in options
        items = [item for item in stable.items if item.samples == 1 or not drafts]
        left_out = Counter(stable.left_out)
        left_out["several samples"] = len(stable.items) - len(items)
        report = Report(
            name,
            distinct=len(items),
            shortened=stable.shortened,
            left_out=left_out,
        )
        say(f"{name}: starts")
        with engine(plan.model, root, paths, steering, **options) as llm:
            still = len(plan.profiles) - at
            left = end - time.monotonic() - START_S * (still - 1) - END_S
            limits.seconds = min(plan.seconds / len(plan.profiles), left / still)
            Chaos(llm, items, versions, report, plan.seed + at).run(limits)
        say("\n".join(report.lines()))
        reports.append(report)
    return reports
