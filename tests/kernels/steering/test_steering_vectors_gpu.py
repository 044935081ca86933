# SPDX-License-Identifier: Apache-2.0
"""The additive tier on the GPU, against float64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from steering_reference import (
    DEVICE,
    DTYPE,
    INTERPRETED,
    check,
    expected,
    make_step,
    make_stream,
    needs_gpu,
    set_row,
)

from vllm.config.steering import Tier
from vllm.model_executor.layers import (
    sae_full_reconstruction_kernel as kernel,
)
from vllm.model_executor.layers.steering_state import (
    ClampKind,
    VectorSlot,
)

pytestmark = [pytest.mark.gpu, needs_gpu]


def make_vectors(capacity: int, d_model: int, max_clamps: int = 12) -> VectorSlot:
    """Random directions; row 1 adds one of them, row 2 many."""
    slot = VectorSlot(capacity, d_model, 5, max_clamps, DEVICE)
    slot.directions.copy_(torch.randn(capacity, d_model))
    set_row(slot.table, 1, [(capacity - 1, ClampKind.ADDITIVE, -2.5, False)])
    many = [(i, ClampKind.ADDITIVE, 0.5 * i + 1, False) for i in range(max_clamps)]
    set_row(slot.table, 2, many)
    return slot


@pytest.mark.parametrize("d_model", [16, 33, 700])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("two_streams", [True, False])
def test_scaled_directions_are_added_to_steered_tokens_only(
    d_model: int, dtype: torch.dtype, two_streams: bool
) -> None:
    if INTERPRETED and dtype is torch.bfloat16:
        pytest.skip("the interpreter rounds bfloat16 differently")
    slot = make_vectors(12, d_model)
    step = make_step(9, 16, [1, 0, 2, 3], Tier.ADDITIVE)
    before = make_stream(9, d_model, dtype, two_streams)
    hidden = before[0].clone()
    residual = None if before[1] is None else before[1].clone()
    kernel.steering_vectors(slot, step, hidden, residual)
    want = expected(slot, Tier.ADDITIVE, step, *before)
    check(want, before, (hidden, residual))


def test_skip_flags_do_not_concern_vectors() -> None:
    slot = make_vectors(12, 32)
    step = make_step(4, 4, [1], Tier.ADDITIVE)
    step.flags.fill_(-1)
    before = make_stream(4, 32, DTYPE)
    hidden, residual = before[0].clone(), before[1]
    assert residual is not None
    after = residual.clone()
    kernel.steering_vectors(slot, step, hidden, after)
    want = expected(slot, Tier.ADDITIVE, step, *before)
    assert len(want) == 4
    check(want, before, (hidden, after))
