# SPDX-License-Identifier: Apache-2.0
"""Bypass flags, and what the kernel counts for each module, against plain PyTorch."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from steering_reference import DEVICE, INTERPRETED, needs_gpu

from vllm.config.steering import Activation, Tier
from vllm.model_executor.layers.steering_bypass import Bypass
from vllm.model_executor.layers.steering_clamp_table import ClampTable
from vllm.model_executor.layers.steering_kernels.flags import (
    SLOTS,
    write_flags,
)
from vllm.model_executor.layers.steering_state import (
    SAESlot,
    SAEWeights,
    StepState,
)

pytestmark = [pytest.mark.gpu, needs_gpu]
VOCAB, ROWS, MAX_CLAMPS = 50, 9, 4


def make_tables(count: int) -> list[tuple[ClampTable, ClampTable]]:
    """Tables of slots whose rows edit at random; row 0 does not."""
    kinds = frozenset({Activation.RELU})
    found = []
    for _ in range(count):
        weights = SAEWeights(4, 8, torch.float32, DEVICE)
        slot = SAESlot(weights, ROWS, MAX_CLAMPS, kinds)
        for table in (slot.delta, slot.full):
            table.packed[1:, 0] = torch.randint(0, 2, (ROWS - 1,), dtype=torch.int32)
        found.append((slot.delta, slot.full))
    return found


@pytest.mark.parametrize("tokens", [1, 7, 300] if INTERPRETED else [1, 7, 300, 8192])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("slots", [(), (1,), (2, SLOTS + 3, 1)])
def test_flags_and_counts_are_those_of_the_reference(
    tokens: int, dtype: torch.dtype, slots: tuple[int, ...]
) -> None:
    torch.manual_seed(tokens)
    step = StepState(8192, DEVICE, VOCAB)
    bits = torch.randint(0, 8, (VOCAB,), dtype=torch.int32, device=DEVICE)
    step.skip_bits.copy_(bits * (torch.rand(VOCAB, device=DEVICE) < 0.4))
    step.index.copy_(torch.randint(0, ROWS, step.index.shape, device=DEVICE))
    step.bypass.watch(
        [Bypass(str(at), 1 << at, make_tables(n)) for at, n in enumerate(slots)]
    )
    ids = torch.randint(-2, VOCAB + 3, (tokens,), dtype=dtype, device=DEVICE)
    known = (ids >= 0) & (ids < VOCAB)
    want = torch.where(known, step.skip_bits[ids.where(known, 0).long()], 0)
    write_flags(step, ids)
    assert torch.equal(step.flags[:tokens], want)
    assert not step.flags[tokens:].any()
    found = step.bypass.counts.tolist()
    step.bypass.counts.zero_()
    rows = step.index[:, :tokens]
    step.bypass.count(want, rows[Tier.DELTA], rows[Tier.FULL])
    assert found == step.bypass.counts.tolist()
    if len(slots) > 1 and tokens >= 300:
        assert all(found)
