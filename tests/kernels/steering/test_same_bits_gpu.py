# SPDX-License-Identifier: Apache-2.0
"""A token's bits depend neither on the length of its step nor on the workspace's room.

Hidden widths on both sides of every block size of the encoder. The encoder's float32
scores are compared too, because rounding to the model's dtype hides most differences.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from steering_reference import (
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

from vllm.config.steering import Activation, Tier
from vllm.model_executor.layers import (
    sae_full_reconstruction_kernel as kernel,
)
from vllm.model_executor.layers.steering_kernels import stages_triton
from vllm.model_executor.layers.steering_kernels.plan import LIST_MAX
from vllm.model_executor.layers.steering_state import SAESlot, SAEWeights

pytestmark = [
    pytest.mark.gpu,
    needs_gpu,
    # NumPy, which the interpreter multiplies with, has no fixed order of its own.
    pytest.mark.skipif(INTERPRETED, reason="needs compiled kernels"),
]

WIDTHS = [8, 16, 24, 40, 64, 72, 100, 128, 136, 200, 256, 264, 520, 1024]
# On both sides of every choice by length: tiles, launches, scans, programs.
LENGTHS = [1, 2, 16, 17, 64, 65, 128, 129, 256, 257, 600, 1024, 1025]
LONGEST = 1300
NARROW = 500  # features that a list has room for
D_SAE = 2 * LIST_MAX + 30  # of ReLU about half of the tokens are dense
KINDS = [Activation.RELU, Activation.JUMPRELU, Activation.TOPK]
APPLY = {Tier.FULL: kernel.full_reconstruction, Tier.DELTA: kernel.sae_clamp}
Stream = tuple[torch.Tensor, torch.Tensor | None]

each_width = pytest.mark.parametrize("width", WIDTHS)
each_kind = pytest.mark.parametrize("activation", KINDS)


def filled(
    activation: Activation, width: int, d_sae: int = D_SAE, dtype: torch.dtype = DTYPE
) -> SAESlot:
    """A random SAE; row 1 reconstructs, row 2 also clamps."""
    torch.manual_seed(width)
    slot = make_slot(d_sae, width, activation, k=32, l0=60, dtype=dtype)
    for table in (slot.full, slot.delta):
        set_row(table, 1, [])
        set_row(table, 2, random_clamps(d_sae, 8))
    return slot


def scores(slot: SAESlot, stream: Stream, tokens: int) -> torch.Tensor:
    """What Triton's encoder writes of the first tokens: float32 [tokens, F]."""
    topk = Activation.TOPK in slot.activations
    step = make_step(tokens, tokens, [1], Tier.FULL)
    workspace = kernel.SteeringWorkspace(tokens, [slot], DEVICE)
    first = (stream[0][:tokens], None if stream[1] is None else stream[1][:tokens])
    run = kernel._make_run(slot, step, workspace, kernel.FULL, topk, *first, None)
    assert run is not None and run.buffers.plan.num_chunks == 1
    stages_triton.compact(run, 0)
    stages_triton.encode(run, 0)
    if topk:
        return run.buffers.scores[:tokens].clone()
    entries = run.buffers.entries[:tokens]
    room = entries.shape[1]
    assert room == NARROW  # a column more takes what lies behind the entries
    listed = torch.arange(room, device=DEVICE) < workspace.records[:tokens, :1]
    feature = torch.where(listed, entries >> 32, room)
    found = torch.zeros(tokens, room + 1, dtype=torch.int64, device=DEVICE)
    found.scatter_(1, feature, entries & 0xFFFFFFFF)
    return found[:, :room].int().view(torch.float32)


def edited(
    slot: SAESlot, tier: Tier, stream: Stream, tokens: int, most: int
) -> torch.Tensor:
    """The first tokens after a tier, of an engine with room for `most` of them."""
    step = make_step(tokens, most, [1, 2], tier)
    workspace = kernel.SteeringWorkspace(most, [slot], DEVICE)
    hidden = stream[0][:tokens].clone()
    residual = None if stream[1] is None else stream[1][:tokens].clone()
    source = hidden.flip(1).contiguous() if slot.reads_source else None
    APPLY[tier](slot, step, workspace, hidden, residual, source)
    return hidden if residual is None else residual


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int32 if x.element_size() == 4 else torch.int16)


def assert_all_are_prefixes(whole: torch.Tensor, parts: dict) -> None:
    """Each part has the bits of the first tokens of `whole`."""
    wrong = {
        name: int((bits(part) != bits(whole[: len(part)])).any(1).sum())
        for name, part in parts.items()
    }
    assert not any(wrong.values()), f"tokens with other bits, by step: {wrong}"


@pytest.mark.parametrize("activation", [Activation.JUMPRELU, Activation.TOPK])
@each_width
def test_tritons_scores_do_not_depend_on_the_length_of_the_step(
    activation: Activation, width: int
) -> None:
    slot = filled(activation, width, NARROW)
    stream = make_stream(LONGEST, width, DTYPE)
    whole = scores(slot, stream, LONGEST)
    assert (whole != 0).sum(1).float().mean() >= 8  # narrow random tokens may have none
    parts = {tokens: scores(slot, stream, tokens) for tokens in LENGTHS}
    assert_all_are_prefixes(whole, parts)


@pytest.mark.parametrize("width", [24, 72, 100, 136])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_tritons_scores_do_not_depend_on_it_in_other_dtypes(
    width: int, dtype: torch.dtype
) -> None:
    slot = filled(Activation.TOPK, width, NARROW, dtype)
    stream = make_stream(LONGEST, width, dtype)
    whole = scores(slot, stream, LONGEST)
    parts = {tokens: scores(slot, stream, tokens) for tokens in LENGTHS}
    assert_all_are_prefixes(whole, parts)


@pytest.mark.usefixtures("implementation")
@each_kind
@each_width
@pytest.mark.parametrize("tier", [Tier.FULL, Tier.DELTA])
def test_what_a_tier_writes_does_not_depend_on_the_step_or_its_room(
    tier: Tier, activation: Activation, width: int
) -> None:
    slot = filled(activation, width)
    stream = make_stream(LONGEST, width, DTYPE)
    whole = edited(slot, tier, stream, LONGEST, LONGEST)
    parts = {
        (tokens, most): edited(slot, tier, stream, tokens, most)
        for tokens in LENGTHS
        for most in (tokens, LONGEST)
    }
    assert_all_are_prefixes(whole, parts)


@pytest.mark.usefixtures("implementation")
@each_kind
@pytest.mark.parametrize("width", [40, 72, 100, 136])
def test_what_a_transcoder_with_a_skip_connection_writes_does_not(
    activation: Activation, width: int
) -> None:
    plain = filled(activation, width)
    weights = SAEWeights(D_SAE, width, DTYPE, DEVICE, width, True)
    for name in ("W_enc", "b_enc", "threshold", "W_dec", "b_dec", "meta", "norm_limit"):
        getattr(weights, name).copy_(getattr(plain.weights, name))
    assert weights.W_skip is not None
    weights.W_skip.copy_(torch.randn(width, width, device=DEVICE) / width**0.5)
    slot = SAESlot(weights, 9, 8, plain.activations, reads_source=True)
    slot.full.packed.copy_(plain.full.packed)
    stream = make_stream(LONGEST, width, DTYPE)
    whole = edited(slot, Tier.FULL, stream, LONGEST, LONGEST)
    parts = {
        tokens: edited(slot, Tier.FULL, stream, tokens, tokens) for tokens in LENGTHS
    }
    assert_all_are_prefixes(whole, parts)
