# SPDX-License-Identifier: Apache-2.0
"""A worker without memory for its slots says what they need, and what would help."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from steering_testing import models
from steering_testing.engine import engine, save_sae
from steering_testing.reference import random_sae

from vllm.config.steering import SlotInfo, SteeringConfig
from vllm.config.steering_checks import SteeringConfigError
from vllm.config.steering_points import HookPoint, PointWidths
from vllm.config.steering_sharding import Ranks
from vllm.v1.worker import steering_modules
from vllm.v1.worker.steering_memory import naming_memory
from vllm.v1.worker.steering_shape import SteeringShape

WIDE = SlotInfo(3, HookPoint.POST_BLOCK, "sae", 131072)
NARROW = SlotInfo(1, HookPoint.POST_BLOCK, "sae", 16384)
ELSEWHERE = SlotInfo(9, HookPoint.POST_BLOCK, "sae", 1 << 20)
SHAPE = SteeringShape(
    num_rows=3,
    max_clamps=4,
    max_tokens=8,
    vocab_size=16,
    widths=PointWidths(hidden=5376, z=4096),
    dtype=torch.bfloat16,
    device=torch.device("cpu"),
    max_read=64,
)


def said(ranks: Ranks, *slots: SlotInfo, error: Exception | None = None) -> str:
    config = SteeringConfig(slots=slots, ranks=ranks)
    with pytest.raises(ValueError) as caught, naming_memory(config, range(4), SHAPE):
        raise error or torch.OutOfMemoryError("CUDA out of memory")
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_the_message_has_the_sum_and_the_largest_of_this_stages_layers() -> None:
    text = said(Ranks(1), WIDE, NARROW, ELSEWHERE)
    assert "need 2.95 GiB, and memory ran out" in text
    assert "post_block.3, has 131072 features x 5376 and needs 2.63 GiB" in text
    assert text.endswith("or tensor-parallel ranks that share them")


def test_it_says_what_sharing_would_save_where_ranks_can_share() -> None:
    text = said(Ranks(4), WIDE, NARROW)
    assert '"sharding": "shard", with which each of 4 ranks needs 0.66 GiB' in text
    assert text.startswith("steering: the SAEs of this rank need 2.95 GiB")
    assert said(Ranks(5), WIDE).endswith("expected fewer or narrower SAEs")


def test_of_shared_saes_a_rank_needs_its_part() -> None:
    shared = SlotInfo(3, HookPoint.POST_BLOCK, "sae", 131072, sharded=True)
    text = said(Ranks(4), shared)
    assert "need 0.66 GiB" in text
    assert text.endswith("or more tensor-parallel ranks than 4")


def test_pytorchs_plain_error_on_a_cpu_is_one_of_memory() -> None:
    plain = RuntimeError(
        "DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"
    )
    assert "need 2.63 GiB" in said(Ranks(1), WIDE, error=plain)
    assert "need 2.63 GiB" in said(Ranks(1), WIDE, error=MemoryError())
    with pytest.raises(RuntimeError, match="another"):
        said(Ranks(1), WIDE, error=RuntimeError("another error"))


@pytest.mark.engine
def test_the_start_up_ends_with_that_message(
    model_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    sae = random_sae(96, models.HIDDEN, "relu", 3)
    path = save_sae(tmp_path / "m", {(1, "post_block"): sae})
    monkeypatch.setattr(steering_modules, "SAEWeights", no_memory)
    with (
        pytest.raises(SteeringConfigError, match="96 features x 64"),
        engine("llama", model_root, {"m": path}),
    ):
        pass
