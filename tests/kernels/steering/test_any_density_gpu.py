# SPDX-License-Identifier: Apache-2.0
"""Full reconstruction with any number of active features: correct, with equal bits."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from steering_reference import (
    DEVICE,
    DTYPE,
    INTERPRETED,
    activations,
    check,
    expected,
    fill_slot,
    make_slot,
    make_step,
    make_stream,
    needs_gpu,
    random_clamps,
    set_row,
    settle,
    stream,
)

from vllm.config.steering import Activation, Tier
from vllm.model_executor.layers import (
    sae_full_reconstruction_kernel as kernel,
)
from vllm.model_executor.layers.steering_kernels import plan
from vllm.model_executor.layers.steering_kernels.plan import LIST_MAX
from vllm.model_executor.layers.steering_state import (
    SAESlot,
    StepState,
)

pytestmark = [
    pytest.mark.gpu,
    needs_gpu,
    pytest.mark.usefixtures("implementation"),
]
compiled_only = pytest.mark.skipif(INTERPRETED, reason="too slow when interpreted")
BOTH = [Activation.RELU, Activation.TOPK]


def with_rows(slot: SAESlot) -> list[int]:
    d_sae = int(slot.weights.meta[0])
    set_row(slot.full, 1, [])
    set_row(slot.full, 2, random_clamps(d_sae, 6))
    return [1, 2, 0]


def fired(slot: SAESlot, streams: tuple[torch.Tensor, torch.Tensor | None]) -> list:
    return (activations(slot, stream(*streams)) != 0).sum(1).tolist()


def run_and_check(slot: SAESlot, step: StepState, tokens: int) -> list[int]:
    """Reconstruct a fresh stream, compare; returns how many features fired."""
    before = make_stream(tokens, slot.weights.d_in, slot.weights.W_enc.dtype)
    assert before[1] is not None
    settle(slot, step, Tier.FULL, stream(*before))
    after = (before[0].clone(), before[1].clone())
    workspace = kernel.SteeringWorkspace(step.max_tokens, [slot], DEVICE)
    workspace._shared.fill_(0xFF)
    kernel.full_reconstruction(slot, step, workspace, *after)
    check(expected(slot, Tier.FULL, step, *before), before, after)
    return fired(slot, before)


@pytest.mark.parametrize("activation", BOTH)
@pytest.mark.parametrize("tokens", [9] if INTERPRETED else [1, 12])
def test_tokens_on_both_sides_of_the_limit_equal_the_reference(
    activation: Activation, tokens: int
) -> None:
    slot = make_slot(2 * LIST_MAX, 48, activation, k=LIST_MAX + 9, topk_relu=False)
    step = make_step(tokens, tokens, with_rows(slot), Tier.FULL)
    counts = run_and_check(slot, step, tokens)
    if activation is Activation.TOPK:
        assert min(counts) > LIST_MAX
    elif tokens > 1:
        assert min(counts) <= LIST_MAX < max(counts)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_odd_sizes_and_other_dtypes_equal_the_reference(dtype: torch.dtype) -> None:
    slot = make_slot(LIST_MAX + 201, 40, Activation.RELU, dtype=dtype, capacity=900)
    slot.weights.b_enc[: LIST_MAX + 201] += 2.0
    step = make_step(5, 5, with_rows(slot), Tier.FULL)
    assert min(run_and_check(slot, step, 5)) > LIST_MAX


def test_more_dense_tokens_than_scratch_pass_in_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plan, "dense_rows", lambda rows, row_bytes, room: min(rows, 3))
    slot = make_slot(800, 48, Activation.RELU)
    slot.weights.b_enc[:800] += 1.0
    step = make_step(10, 10, with_rows(slot), Tier.FULL)
    assert min(run_and_check(slot, step, 10)) > LIST_MAX


@compiled_only
@pytest.mark.parametrize("activation", BOTH)
@pytest.mark.parametrize("tokens", [8, 9, 32, 64, 65, 128, 129, 256, 300, 1500])
def test_every_launch_size_equals_the_reference(
    activation: Activation, tokens: int
) -> None:
    slot = make_slot(3000, 328, activation, k=1200)
    step = make_step(tokens, 2048, with_rows(slot), Tier.FULL)
    run_and_check(slot, step, tokens)


@compiled_only
@pytest.mark.parametrize("d_model", [8, 64, 72, 136, 520, 2304])
def test_every_width_of_rows_equals_the_reference(d_model: int) -> None:
    slot = make_slot(2100, d_model, Activation.RELU)
    step = make_step(40, 64, with_rows(slot), Tier.FULL)
    run_and_check(slot, step, 40)


def reconstructed(slot: SAESlot, streams: tuple, first: int, count: int, most: int):
    """What tokens `first` onwards become as a step of their own."""
    step = make_step(count, most, [2], Tier.FULL)
    workspace = kernel.SteeringWorkspace(most, [slot], DEVICE)
    hidden = streams[0][first : first + count].clone()
    residual = streams[1][first : first + count].clone()
    kernel.full_reconstruction(slot, step, workspace, hidden, residual)
    assert not step.sync[:6].any()  # counters of CUDA kernels are back at zero
    return residual


@pytest.mark.parametrize("activation", BOTH)
def test_a_token_has_the_same_bits_alone_and_in_a_batch(activation: Activation) -> None:
    slot = make_slot(2 * LIST_MAX, 32, activation, k=600)
    with_rows(slot)
    streams = make_stream(9, 32, DTYPE)
    whole = reconstructed(slot, streams, 0, 9, 9)
    for t in (4,) if INTERPRETED else (0, 4, 8):
        assert torch.equal(reconstructed(slot, streams, t, 1, 9)[0], whole[t])


@compiled_only
@pytest.mark.parametrize("activation", BOTH)
def test_thousands_of_non_zeros_have_the_same_bits_at_any_batch_and_capacity(
    activation: Activation,
) -> None:
    slot = make_slot(16384, 2304, activation, k=3000)
    with_rows(slot)
    streams = make_stream(8192, 2304, DTYPE)
    assert min(fired(slot, (streams[0][:4], streams[1][:4]))) > 2000
    whole = reconstructed(slot, streams, 0, 8192, 8192)
    for first, count, most in ((0, 1, 1), (0, 1, 8192), (40, 7, 64), (8000, 192, 256)):
        alone = reconstructed(slot, streams, first, count, most)
        assert torch.equal(alone, whole[first : first + count])
    again = reconstructed(slot, streams, 0, 8192, 8192)
    assert torch.equal(again, whole)


@compiled_only
def test_a_captured_graph_goes_from_lists_to_dense_tokens_and_back() -> None:
    slot = make_slot(2048, 256, Activation.JUMPRELU, l0=40)
    rows = with_rows(slot)
    tokens = 48
    step = make_step(tokens, 64, rows, Tier.FULL)
    workspace = kernel.SteeringWorkspace(64, [slot], DEVICE)
    hidden, residual = make_stream(tokens, 256, DTYPE)
    assert residual is not None
    kernel.warm_up([slot], [], StepState(64, DEVICE), workspace, DTYPE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel.full_reconstruction(slot, step, workspace, hidden, residual)
    for l0 in (40, 1500, 2, 600, 2047, 40):
        fill_slot(slot, 2048, Activation.JUMPRELU, l0=l0)
        before = make_stream(tokens, 256, DTYPE)
        assert before[1] is not None
        hidden.copy_(before[0])
        residual.copy_(before[1])
        settle(slot, step, Tier.FULL, stream(*before))
        graph.replay()
        torch.cuda.synchronize()
        check(expected(slot, Tier.FULL, step, *before), before, (hidden, residual))
