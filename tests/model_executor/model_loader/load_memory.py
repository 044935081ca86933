# SPDX-License-Identifier: Apache-2.0
"""Load a rank's part of each module in a child that may allocate no more than a limit.

    python load_memory.py '[["native", "/path", null]]' RANKS SPARE_BYTES CHUNK_BYTES

A child may allocate its part of the SAE and `SPARE_BYTES`. Prints one JSON object:
for each module whether its part was loaded, and whether all of it was.
"""

from __future__ import annotations

import json
import os
import sys

import torch

from vllm.config.steering import ModuleInfo
from vllm.model_executor.layers import steering_chunks
from vllm.model_executor.layers.steering_shards import WHOLE, Shard
from vllm.model_executor.layers.steering_state import SAEWeights
from vllm.model_executor.model_loader.sae_inspector_process import limit_resources
from vllm.model_executor.model_loader.sae_loader import inspect_module, load_site
from vllm.model_executor.model_loader.sae_location import locate


def part_bytes(module: ModuleInfo, shard: Shard) -> int:
    """Of what a rank holds of the module's only site."""
    (site,) = module.sites
    meta = torch.device("meta")
    weights = SAEWeights.for_site(site, torch.float32, meta, shard)
    return sum(tensor.nbytes for tensor in weights.tensors())


def loads_within(module: ModuleInfo, shard: Shard, limit: int) -> bool:
    """Whether a child loads this part with `limit` bytes to allocate."""
    if (child := os.fork()) == 0:
        try:
            location = locate(module.name, module.path).location
            limit_resources(limit)
            (site,) = module.sites
            cpu = torch.device("cpu")
            weights = SAEWeights.for_site(site, torch.float32, cpu, shard)
            load_site(module, site, weights, location)
        except (MemoryError, RuntimeError, ValueError) as error:
            known = isinstance(error, MemoryError) or "llocate" in str(error)
            os._exit(1 if known or "MemoryError" in str(error) else 2)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFEXITED(status) and os.WEXITSTATUS(status) in (0, 1), status
    return os.WEXITSTATUS(status) == 0


def main(given: str, ranks: int, spare: int, chunk: int) -> None:
    """Print what was found for each module."""
    torch.set_num_threads(1)  # a forked child has one
    steering_chunks.CHUNK_BYTES = chunk
    found = {}
    for name, path, sites in json.loads(given):
        module = inspect_module(name, path, sites=sites)
        last = Shard(ranks - 1, ranks)
        limit = part_bytes(module, last) + spare
        found[name] = {
            "part": loads_within(module, last, limit),
            "whole": loads_within(module, WHOLE, limit),
            "format": module.format,
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], *(int(number) for number in sys.argv[2:]))
