# SPDX-License-Identifier: Apache-2.0
"""What an engine core says about its modules: the list, and counts for metrics."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm.config.sae_steering_specs import EXTRA_ARGS_KEYS
from vllm.config.steering import SteeringConfig
from vllm.config.steering_json import Json
from vllm.config.steering_slots import free_slots, module_bytes
from vllm.v1.engine.steering_reads import ReadCounts

if TYPE_CHECKING:
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.request import Request


def listing_of(core: EngineCore, config: SteeringConfig) -> Json:
    """Modules with their memory and requests, and the slots that are free."""
    item_bytes = core.vllm_config.model_config.dtype.itemsize
    modules = [
        {
            **module.described(),
            "weight_bytes": module_bytes(module, item_bytes, config.ranks),
            "requests": requests_of(core, name),
            "draining": name in config.draining,
        }
        for name, module in config.modules.items()
    ]
    free = [{"id": i, **slot.to_json()} for i, slot in free_slots(config).items()]
    return {"modules": modules, "free_slots": free}


def stats_of(core: EngineCore, config: SteeringConfig, workers: list[Json]) -> Json:
    """Counts of all ranks, and what requests have read of each module.

    `workers` are the ranks' replies: all have the same rows and steered tokens, and
    bytes of their own. What a pipeline's stages do to tokens is added up.
    """
    stages = workers[:: core.vllm_config.parallel_config.tensor_parallel_size]
    reads = core.scheduler.sae_step_reads
    counts = {} if reads is None else reads.counts
    return {
        **workers[0]["stats"],
        "module_tokens": tokens_of_stages([reply["stats"] for reply in stages]),
        "bytes": [reply["stats"]["bytes"] for reply in workers],
        "read": {
            name: dataclasses.asdict(counts.get(name, ReadCounts()))
            for name in config.modules
        },
    }


def tokens_of_stages(stages: Sequence[Json]) -> Json:
    """What each module did to tokens, given the counts of each stage's modules."""
    found: Json = {}
    for stage in stages:
        for module, tokens in stage["module_tokens"].items():
            before = found.get(module) or {"bypassed": 0, "saturated": 0}
            found[module] = {
                **tokens,
                **{key: tokens[key] + before[key] for key in ("bypassed", "saturated")},
            }
    return found


def requests_of(core: EngineCore, name: str) -> int:
    """Requests that run or wait and name the module."""
    requests = core.scheduler.requests.values()
    return sum(not r.is_finished() and name in named_modules(r) for r in requests)


def named_modules(request: Request) -> set[str]:
    """The modules that an admitted request names."""
    params = request.sampling_params
    if params is None or not params.extra_args:
        return set()
    return {
        spec["module_name"]
        for key in EXTRA_ARGS_KEYS
        for spec in params.extra_args.get(key, ())
        if "module_name" in spec  # not a vector of the request's own
    }
