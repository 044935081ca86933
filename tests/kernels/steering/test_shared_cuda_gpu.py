# SPDX-License-Identifier: Apache-2.0
"""Ranks that share an SAE through their memory write the bits of one rank: the CUDA
stages, with ranks that take turns on one device."""

from __future__ import annotations

from typing import Any

import pytest
import test_shared_gpu
import torch
from steering_reference import DEVICE, INTERPRETED
from steering_testing.shards import shared_slot
from test_shared_gpu import Case, check

from vllm.config.steering import Activation
from vllm.model_executor.layers.steering_kernels import stages_shared_cuda
from vllm.model_executor.layers.steering_kernels.extension import extension_is_built
from vllm.model_executor.layers.steering_kernels.run import Run
from vllm.model_executor.layers.steering_kernels.screen import ScreenCopy
from vllm.model_executor.layers.steering_shards import Shard
from vllm.model_executor.layers.steering_state import SAESlot

pytestmark = pytest.mark.skipif(
    INTERPRETED or not extension_is_built(), reason="needs the CUDA extension"
)

JUMP, TOPK = Activation.JUMPRELU, Activation.TOPK
CASES = [
    Case(1, 512, 64, JUMP, 12),
    Case(5, 512, 64, JUMP, 12),
    Case(3, 512, 64, TOPK, 8, two_streams=False),
    Case(5, 2048, 64, JUMP, 700),  # dense: more than a list holds
    Case(9, 1024, 128, JUMP, 504, ranks=4),  # on either side of it
    Case(3, 2048, 64, TOPK, 600),
    Case(20, 1024, 96, JUMP, 20, dtype=torch.float16),
    Case(4, 1024, 64, TOPK, 5, ranks=4, dtype=torch.float16),
    Case(600, 2048, 1088, JUMP, 40, ranks=4),  # a slice that is not full
    Case(600, 2048, 64, JUMP, 500),
    Case(5000, 1024, 64, JUMP, 30),  # several chunks
    Case(300, 65536, 64, JUMP, 700, two_streams=False),  # several chunks are dense
]
WIDE = [
    Case(tokens, 16384, 2304, activation, l0, ranks)
    for tokens in (1, 64, 300, 2048)
    for activation in (JUMP, TOPK)
    for l0 in (64, 1000)
    for ranks in (2, 4)
]


@pytest.fixture(autouse=True)
def used(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """Runs that took the kernels in question; clamps must take them too."""
    found: list[Run] = []
    takes, takes_clamp = stages_shared_cuda.takes, stages_shared_cuda.takes_clamp

    def noted(run: Run) -> bool:
        assert takes(run)
        found.append(run)
        return True

    def clamps(*streams: Any) -> bool:
        assert takes_clamp(*streams)
        return True

    monkeypatch.setattr(stages_shared_cuda, "takes", noted)
    monkeypatch.setattr(stages_shared_cuda, "takes_clamp", clamps)
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ranks_write_the_bits_of_one(case: Case, used: list[Run]) -> None:
    check(case, DEVICE)
    assert used


@pytest.mark.parametrize("case", WIDE, ids=str)
def test_ranks_write_the_bits_of_one_at_real_widths(
    case: Case, used: list[Run]
) -> None:
    check(case, DEVICE)
    assert used


@pytest.mark.parametrize(
    "case",
    [
        Case(1, 32768, 576, JUMP, 60),
        Case(7, 20480, 1152, JUMP, 40, ranks=4),
        Case(33, 33792, 2304, JUMP, 80),
        Case(64, 16384, 2304, JUMP, 700),
        Case(200, 16384, 576, JUMP, 30, ranks=4, dtype=torch.float16),
    ],
    ids=str,
)
def test_screened_ranks_write_the_bits_of_one(
    case: Case, used: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    def screened_slot(slot: SAESlot, shard: Shard) -> SAESlot:
        own = shared_slot(slot, shard)
        own.weights.screen = ScreenCopy(*own.weights.W_enc.shape, DEVICE)
        own.weights.refresh()
        return own

    monkeypatch.setattr(test_shared_gpu, "shared_slot", screened_slot)
    check(case, DEVICE)
    assert used
