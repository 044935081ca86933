# SPDX-License-Identifier: Apache-2.0
"""What schedules cost the host: a batch of 256 requests, by phases and by spans.

    python benchmarks/bench_host.py [--steps 512] [--requests 256] [--rounds 9]

No model runs: a worker's steering is driven through the life of a batch, as a model
runner drives it. Every request is steered its own way, so that nothing is shared.

- phases: one edit of the prompt, another one of the answer;
- spans: six places of the prompt and the answer where the edit changes, drawn at
  random, so that some request changes in most steps.

Costs, the least of the rounds, in microseconds of the thread's own time:

- `decode`: a step of one token a request, on average over the answer;
- `life`: all that the batch costs a worker (admission, prefill, decoding, end),
  divided by its steps;
- `admit`: the admission of one request by the worker;
- `engine`: what the engine core does for one request before: it reads the specs and
  computes the digests. An engine that knows the specs already does not.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm import LLM, SamplingParams
from vllm.config.sae_steering_admission import admitted_extra_args
from vllm.config.sae_steering_parser import parse_steering_request
from vllm.config.steering import SteeringConfig
from vllm.v1.worker.steering_index import BatchView
from vllm.v1.worker.steering_runtime import SteeringRuntime

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "golden_gate"
PROMPT = 32
KINDS = ("phases", "spans")


def clamps(value: float, feature: int = 7) -> list[dict[str, Any]]:
    return [{"feature_idx": feature, "kind": "absolute", "value": value}]


def by_phases(at: int, steps: int) -> list[dict[str, Any]]:
    """The specs of a request that is steered by phase."""
    return [
        {"module_name": "gg", "clamps": clamps(at, feature), "phase": phase}
        for feature, phase in ((7, "prefill"), (8, "decode"))
    ]


def by_spans(at: int, steps: int) -> list[dict[str, Any]]:
    """The specs of a request whose edit changes at six places."""
    rng = random.Random(at)
    places = sorted(rng.sample(range(1, steps), 5))
    generated = zip([0, *places], [*places, None], strict=True)
    spans = [("prompt", -rng.randrange(1, PROMPT), None)]
    spans += [("generated", start, stop) for start, stop in generated]
    return [
        {
            "module_name": "gg",
            "clamps": clamps(at + share / 16),
            "spans": [dict(zip(("of", "start", "stop"), span, strict=True))],
        }
        for share, span in enumerate(spans)
    ]


SPECS: dict[str, Callable[[int, int], list[dict[str, Any]]]] = {
    "phases": by_phases,
    "spans": by_spans,
}


@dataclass
class Batch:
    """The requests of one kind, and how far they are."""

    params: list[SamplingParams]
    token_ids: torch.Tensor

    @property
    def req_ids(self) -> list[str]:
        return [f"r{at}" for at in range(len(self.params))]

    def view(self, computed: int, scheduled: int) -> BatchView:
        n = len(self.params)
        return BatchView(
            req_ids=self.req_ids,
            num_scheduled=np.full(n, scheduled, dtype=np.int32),
            num_computed=np.full(n, computed, dtype=np.int32),
            prompt_len=np.full(n, PROMPT, dtype=np.int32),
            token_ids=self.token_ids,
        )


def make_batch(
    kind: str, config: SteeringConfig, requests: int, steps: int
) -> tuple[Batch, float]:
    """Requests as the engine admits them, and the seconds that this takes."""
    given = [
        {"sae_full_reconstruction_specs": SPECS[kind](at, steps)}
        for at in range(requests)
    ]
    config = replace(config)  # which knows no specs yet
    begin = time.thread_time()
    args = [
        admitted_extra_args(one, parse_steering_request(one, config), config, PROMPT)
        for one in given
    ]
    taken = time.thread_time() - begin
    made = [SamplingParams(extra_args=one) for one in args]
    return Batch(made, torch.zeros(requests * PROMPT, dtype=torch.int32)), taken


def live(runtime: SteeringRuntime, batch: Batch, steps: int) -> dict[str, float]:
    """Seconds of the life of a batch: all of it, admission, and the decode steps."""
    views = [batch.view(PROMPT + step, 1) for step in range(steps)]
    prefill = batch.view(0, PROMPT)
    begin = time.thread_time()
    for req_id, params in zip(batch.req_ids, batch.params, strict=True):
        runtime.add_request(req_id, params)
    admitted = time.thread_time()
    runtime.prepare_step(prefill)
    first = time.thread_time()
    for view in views:
        runtime.prepare_step(view)
    last = time.thread_time()
    for req_id in batch.req_ids:
        runtime.remove_request(req_id)
    runtime.clear_step()
    end = time.thread_time()
    return {"life": end - begin, "admit": admitted - begin, "decode": last - first}


def measure(runtime: SteeringRuntime, args: argparse.Namespace) -> dict[str, Any]:
    """The least costs in microseconds, by kind; the kinds take turns.

    The least, because whatever else runs on the machine only adds to it.
    """
    rounds: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for _ in range(args.rounds + 1):  # the first one warms up
        for kind in KINDS:
            batch, taken = make_batch(kind, runtime.config, args.requests, args.steps)
            costs = live(runtime, batch, args.steps)
            rounds[kind].append(costs | {"engine": taken})
    per = {
        "life": args.steps,
        "admit": args.requests,
        "decode": args.steps,
        "engine": args.requests,
    }
    return {
        kind: {
            cost: 1e6 * min(one[cost] for one in found[1:]) / count
            for cost, count in per.items()
        }
        for kind, found in rounds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=512)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    llm = LLM(
        str(EXAMPLE / "model"),
        dtype="float32",
        max_model_len=256,
        max_num_seqs=args.requests,
        max_num_batched_tokens=args.requests * PROMPT,
        kv_cache_memory_bytes=1 << 27,
        enforce_eager=True,
        additional_config={"steering": {"modules": {"gg": str(EXAMPLE / "sae")}}},
    )
    core = llm.llm_engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    found = measure(runner.steering, args)
    found["spans / phases"] = {
        cost: found["spans"][cost] / found["phases"][cost] for cost in found["spans"]
    }
    for kind, costs in found.items():
        print(kind, json.dumps({cost: round(us, 3) for cost, us in costs.items()}))


if __name__ == "__main__":
    main()
