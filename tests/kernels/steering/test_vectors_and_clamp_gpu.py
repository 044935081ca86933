# SPDX-License-Identifier: Apache-2.0
"""A site's vectors and clamps in one launch: the bits of two."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from steering_reference import (  # noqa: E402
    DEVICE,
    DTYPE,
    INTERPRETED,
    make_slot,
    make_step,
    make_stream,
    needs_gpu,
    random_clamps,
    set_row,
)

from vllm.config.steering import Activation, Tier  # noqa: E402
from vllm.model_executor.layers import (  # noqa: E402
    sae_full_reconstruction_kernel as kernel,
)
from vllm.model_executor.layers.steering_state import (  # noqa: E402
    ClampKind,
    StepState,
    VectorSlot,
)

pytestmark = [pytest.mark.gpu, needs_gpu]
Streams = tuple[torch.Tensor, torch.Tensor | None]


def make_vectors(d_model: int) -> VectorSlot:
    """Row 1 adds one direction; row 2 adds several, one of them by the norm."""
    slot = VectorSlot(6, d_model, 4, 12, DEVICE)
    slot.directions.copy_(torch.randn(6, d_model))
    set_row(slot.table, 1, [(5, ClampKind.ADDITIVE, -2.5, False)])
    several = [(i, ClampKind.ADDITIVE, 0.5 * i + 1, False) for i in range(4)]
    set_row(slot.table, 2, several)
    return slot


def make_both_steps(tokens: int) -> StepState:
    """Tokens with vectors, with clamps, with both, and with neither."""
    step = make_step(tokens, tokens, [0, 1, 2, 0, 1, 2], Tier.ADDITIVE)
    rows = torch.tensor([0, 0, 1, 2, 2, 1, 0], dtype=torch.int32, device=DEVICE)
    step.index[Tier.DELTA] = rows.repeat(tokens)[:tokens]
    return step


@pytest.mark.parametrize("d_model", [64] if INTERPRETED else [64, 576, 5000])
@pytest.mark.parametrize("two_streams", [True, False])
@pytest.mark.parametrize("activation", [Activation.RELU, Activation.TOPK])
def test_one_launch_gives_the_bits_of_two(
    d_model: int, two_streams: bool, activation: Activation
) -> None:
    tokens = 7 if INTERPRETED else 42
    slot = make_slot(300, d_model, activation)
    set_row(slot.delta, 1, random_clamps(300, 3))
    set_row(slot.delta, 2, random_clamps(300, 8))
    vectors, step = make_vectors(d_model), make_both_steps(tokens)
    before = make_stream(tokens, d_model, DTYPE, two_streams)

    def run(together: bool) -> Streams:
        hidden = before[0].clone()
        residual = None if before[1] is None else before[1].clone()
        workspace = kernel.SteeringWorkspace(tokens, [slot], DEVICE)
        if together:
            kernel.vectors_and_clamp(vectors, slot, step, workspace, hidden, residual)
        else:
            kernel.steering_vectors(vectors, step, hidden, residual)
            kernel.sae_clamp(slot, step, workspace, hidden, residual)
        return hidden, residual

    saturated = int(slot.saturated), vectors.saturated.tolist()
    apart, together = run(False), run(True)
    assert torch.equal(apart[0], together[0])
    if two_streams:
        assert apart[1] is not None and together[1] is not None
        assert torch.equal(apart[1], together[1])
    changed = apart[0] if apart[1] is None else apart[1]
    old = before[0] if before[1] is None else before[1]
    assert not torch.equal(changed, old)
    assert (int(slot.saturated), vectors.saturated.tolist()) == saturated


def test_a_step_without_rows_changes_nothing() -> None:
    slot = make_slot(300, 64)
    vectors, step = make_vectors(64), StepState(5, DEVICE)
    hidden, residual = before = make_stream(5, 64, DTYPE)
    assert residual is not None
    after = (hidden.clone(), residual.clone())
    workspace = kernel.SteeringWorkspace(5, [slot], DEVICE)
    kernel.vectors_and_clamp(vectors, slot, step, workspace, *after)
    assert torch.equal(before[0], after[0])
    assert torch.equal(residual, after[1])
