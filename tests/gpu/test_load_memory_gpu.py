# SPDX-License-Identifier: Apache-2.0
"""Device memory that PyTorch's caching allocator keeps after loading, on a real card.

`test_load_allocations.py` has a model of the allocator, and runs on a CPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from steering_testing import models
from steering_testing.allocator import MIB, CachingAllocator
from steering_testing.engine import engine, save_sae
from steering_testing.matrix import FAMILY, SITES
from steering_testing.reference import random_sae

from vllm.v1.worker import steering_build
from vllm.v1.worker.gpu_worker import Worker

WIDTH = 1 << 18  # features: 32 MiB for each matrix in bfloat16, 8 chunks of its file
MODULES = 2
MOST_KEPT = 32 * MIB  # docs/features/operating.md
ORDERS = ((20, 24, 32, 24, 20, 32), (4, 8, 4, 8, 4, 8, 4, 8), (12, 3, 12, 3, 40, 12))


@pytest.mark.parametrize("sizes", ORDERS)
def test_the_model_of_the_allocator_reserves_what_the_allocator_does(
    sizes: tuple[int, ...],
) -> None:
    """Two of these sizes at a time, under the limit that vLLM sets while it loads."""
    model = CachingAllocator()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    with Worker._scoped_allocator_max_split(None, 20):  # type: ignore[arg-type]
        for pair in zip(sizes[::2], sizes[1::2], strict=True):
            tensors = [
                torch.empty(size * MIB, dtype=torch.uint8, device="cuda")
                for size in pair
            ]
            del tensors
            for block in [model.take(size * MIB) for size in pair]:
                model.give(block)
        reserved = torch.cuda.memory_reserved() - before
    torch.cuda.empty_cache()
    assert reserved == model.reserved


def test_all_modules_are_loaded_through_one_small_block(
    model_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae = random_sae(WIDTH, models.HIDDEN, "jumprelu", 3)
    path = save_sae(tmp_path / "sae", dict.fromkeys(SITES, sae))
    modules = {f"m{at}": {"path": path} for at in range(MODULES)}
    kept: list[int] = []
    load = steering_build._load

    def watched(*args: Any) -> None:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_reserved()
        load(*args)
        kept.append(torch.cuda.max_memory_reserved() - before)

    monkeypatch.setattr(steering_build, "_load", watched)
    options: dict[str, Any] = {"dtype": "bfloat16", "gpu_memory_utilization": 0.2}
    with engine(FAMILY, model_root, modules, **options):
        assert len(kept) == MODULES
        print("kept, MiB:", [size / MIB for size in kept], flush=True)
        assert sum(kept) <= MOST_KEPT
