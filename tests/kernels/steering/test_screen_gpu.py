# SPDX-License-Identifier: Apache-2.0
"""Screened steps leave the bits of the plain encoder, whatever the data."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("triton")

from steering_reference import DEVICE, INTERPRETED, make_slot, make_step, set_row

from vllm.config.steering import Activation, Tier
from vllm.model_executor.layers import sae_full_reconstruction_kernel as kernel
from vllm.model_executor.layers.steering_kernels import stages_cuda
from vllm.model_executor.layers.steering_kernels.extension import Kernels, kernels_for
from vllm.model_executor.layers.steering_kernels.screen import (
    SCREEN_TOKENS,
    STATE_MOST,
    ScreenCopy,
)
from vllm.model_executor.layers.steering_state import SAESlot

CAN_SCREEN = (
    not INTERPRETED
    and torch.cuda.is_available()
    and Kernels.STAGES in kernels_for(DEVICE)
)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not CAN_SCREEN, reason="needs Hopper and the extension"),
]

BF16, FP16 = torch.bfloat16, torch.float16
# Features, width: one and many orders of columns, ends of tiles, several tiles a block.
SHAPES = [(300, 72), (5000, 576), (20000, 1000), (34000, 2304), (33000, 4096)]
KINDS = ["normal", "massive", "heavy rows", "small and zero", "specials", "ties"]
# Tokens of a step, and how many of them are steered.
STEPS = [(1, 1), (8, 5), (33, 32), (64, 64), (200, 40), (90, 80)]


@dataclass
class Listed:
    """What a step's encoder found: per steered token its id and its list."""

    tokens: list[tuple[int, torch.Tensor | None]]


def make_weights(slot: SAESlot, kind: str) -> None:
    w = slot.weights.W_enc
    if kind == "heavy rows":
        rows = torch.randint(w.shape[0], (w.shape[0] // 8 + 1,), device=DEVICE)
        w[rows] *= torch.exp(3 * torch.randn(len(rows), 1, device=DEVICE)).to(w.dtype)
        w[rows, torch.randint(w.shape[1], rows.shape, device=DEVICE)] += 5
    if kind == "small and zero":
        w[::5] = 0
        w[1::7] *= 1e-6
        slot.weights.b_enc.zero_()


def make_stream(kind: str, tokens: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(tokens, width, device=DEVICE)
    if kind == "massive":
        large = torch.tensor([300.0, -900.0, 40.0], device=DEVICE)
        x[:, torch.randperm(width, device=DEVICE)[:3]] += large
    if kind == "specials":
        x[0] = 0
        for at, value in enumerate((float("inf"), float("nan"), 1e-7), start=1):
            if at < tokens:
                x[at, 3] = value
    return x.to(dtype)


def encode(slot: SAESlot, x: torch.Tensor, steered: torch.Tensor) -> Listed:
    """The lists of one step, sorted by feature."""
    tokens = x.shape[0]
    step = make_step(tokens, tokens, [0], Tier.FULL)
    step.index[Tier.FULL, steered] = 1
    workspace = kernel.SteeringWorkspace(tokens, [slot], DEVICE)
    run = kernel._make_run(
        slot, step, workspace, kernel.FULL, False, x.clone(), None, None
    )
    assert run is not None
    stages_cuda.compact_encode(run)
    assert not step.sync.any()
    found = Listed([])
    room = run.buffers.plan.capacity
    for i in range(int(workspace.count)):
        listed, token = workspace.records[i, :2].tolist()
        own = None
        if token >= 0:
            assert listed <= room or room == 512
            own = torch.tensor([listed])
        if token >= 0 and listed <= room:
            own = run.buffers.entries[i, :listed].sort().values.cpu()
        found.tokens.append((token, own))
    return found


def screened(slot: SAESlot) -> ScreenCopy:
    w = slot.weights.W_enc
    copy = ScreenCopy(*w.shape, DEVICE)
    copy.fill(w)
    copy.state[STATE_MOST] = SCREEN_TOKENS
    return copy


def check(slot: SAESlot, x: torch.Tensor, steered: torch.Tensor) -> None:
    copy = slot.weights.screen
    slot.weights.screen = None
    want = encode(slot, x, steered)
    slot.weights.screen = copy
    found = encode(slot, x, steered)
    assert [t for t, _ in found.tokens] == [t for t, _ in want.tokens]
    for (_, own), (_, other) in zip(found.tokens, want.tokens, strict=True):
        assert (own is None) == (other is None)
        if own is not None and other is not None:
            assert torch.equal(own, other)


def settle_ties(slot: SAESlot, x: torch.Tensor, steered: torch.Tensor) -> None:
    """Thresholds at scores that some token has: half equal them, half lie below."""
    slot.weights.b_enc.zero_()
    copy, slot.weights.screen = slot.weights.screen, None
    found = encode(slot, x, steered)
    slot.weights.screen = copy
    for _, own in found.tokens:
        if own is None or len(own) < 2:
            continue
        feature = (own >> 32).to(DEVICE)
        value = (own & 0xFFFFFFFF).to(torch.int32).view(torch.float32).to(DEVICE)
        below = torch.nextafter(value, torch.zeros_like(value))
        slot.weights.threshold[feature[::2]] = value[::2]
        slot.weights.threshold[feature[1::2]] = below[1::2]


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("d_sae", "width"), SHAPES)
def test_screened_lists_are_those_of_the_plain_encoder(
    d_sae: int, width: int, kind: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(d_sae)
    slot = make_slot(d_sae, width, Activation.JUMPRELU, l0=20, dtype=dtype)
    set_row(slot.full, 1, [])
    make_weights(slot, kind)
    slot.weights.screen = screened(slot)
    for tokens, count in STEPS:
        x = make_stream(kind, tokens, width, dtype)
        steered = torch.randperm(tokens, device=DEVICE)[:count]
        if kind == "ties":
            settle_ties(slot, x, steered)
        slot.weights.screen.state[:STATE_MOST].zero_()
        check(slot, x, steered)
        check(slot, x, steered)


def test_too_many_candidates_turn_the_screen_off_for_a_while() -> None:
    slot = make_slot(3000, 576, Activation.RELU, dtype=BF16)
    set_row(slot.full, 1, [])
    slot.weights.screen = screened(slot)
    x = make_stream("normal", 4, 576, BF16)
    left = []
    for _ in range(259):
        check(slot, x, torch.arange(4, device=DEVICE))
        left.append(int(slot.weights.screen.state[0]))
    assert left == [*range(256, -1, -1), 256, 255]
    assert slot.weights.screen.state[1:STATE_MOST].tolist() == [0, 0]


def test_a_step_of_more_tokens_than_are_screened_leaves_the_state_alone() -> None:
    slot = make_slot(3000, 576, Activation.RELU, dtype=BF16)
    set_row(slot.full, 1, [])
    slot.weights.screen = screened(slot)
    slot.weights.screen.state[STATE_MOST] = 8
    check(slot, make_stream("normal", 9, 576, BF16), torch.arange(9, device=DEVICE))
    assert slot.weights.screen.state.tolist() == [0, 0, 0, 8]


@pytest.mark.parametrize("tokens", [1, 9, 64, 130])
def test_a_reconstruction_has_the_same_bits(tokens: int) -> None:
    slot = make_slot(20000, 1000, Activation.JUMPRELU, l0=30, dtype=BF16)
    set_row(slot.full, 1, [])
    copy = screened(slot)
    x = make_stream("normal", tokens, 1000, BF16)
    step = make_step(tokens, tokens, [1], Tier.FULL)
    results = []
    for screen in (None, copy):
        slot.weights.screen = screen
        workspace = kernel.SteeringWorkspace(tokens, [slot], DEVICE)
        hidden = x.clone()
        kernel.full_reconstruction(slot, step, workspace, hidden, None)
        results.append(hidden)
    assert torch.equal(*results)
    assert not torch.equal(results[0], x)
