# SPDX-License-Identifier: Apache-2.0
"""Ranks that share a transcoder write the bits of one rank: the Triton stages, with
ranks that take turns on one device."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("triton")

from lockstep import Lockstep
from steering_reference import (
    DEVICE,
    DTYPE,
    INTERPRETED,
    make_step,
    needs_gpu,
    random_clamps,
    set_row,
)
from steering_testing.shards import shared_slot

from vllm.config.steering import Activation, SiteInfo, Tier
from vllm.config.steering_points import HookPoint
from vllm.model_executor.layers import (
    sae_full_reconstruction_kernel as kernel,
)
from vllm.model_executor.layers.steering_shards import Shard
from vllm.model_executor.layers.steering_state import (
    ClampKind,
    SAESlot,
    SAEWeights,
    StepState,
)

pytestmark = [
    pytest.mark.gpu,
    needs_gpu,
    pytest.mark.usefixtures("triton_alone"),
]
JUMP, TOPK = Activation.JUMPRELU, Activation.TOPK


@dataclass(frozen=True)
class Case:
    """`bar`: the threshold, in standard deviations; `k`: TopK's."""

    tokens: int
    d_sae: int
    d_in: int
    d_out: int
    activation: Activation
    ranks: int = 2
    skip: bool = True
    two_streams: bool = False
    bar: float = 1.3
    k: int = 12


CASES = [
    Case(9, 128, 40, 64, JUMP),
    Case(9, 128, 96, 64, JUMP, ranks=4, skip=False, two_streams=True),
    Case(7, 128, 64, 64, TOPK),
    Case(6, 1280, 48, 32, JUMP, bar=-9.0),  # dense: more than a list holds
]
SLOW = [Case(6, 1280, 48, 64, TOPK, ranks=4, k=600, two_streams=True)]
WIDE = [
    Case(tokens, 16384, 2304, 2304, activation, ranks, bar=bar, k=k)
    for tokens in (1, 64, 300)
    for activation in (JUMP, TOPK)
    for bar, k in ((2.7, 64), (1.5, 1000))
    for ranks in (2, 4)
]


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE)


def make_slot(case: Case) -> SAESlot:
    d_sae, d_in, d_out = case.d_sae, case.d_in, case.d_out
    weights = SAEWeights(d_sae, d_in, DTYPE, DEVICE, d_out, case.skip)
    kinds = frozenset({case.activation})
    slot = SAESlot(weights, 6, 8, kinds, reads_source=True)
    weights.W_enc.copy_(normal(d_sae, d_in) / d_in**0.5)
    weights.W_dec.copy_(normal(d_sae, d_out) / d_out**0.5)
    weights.b_enc.copy_(0.1 * normal(d_sae))
    weights.b_dec.copy_(normal(d_out))
    weights.threshold.fill_(case.bar)
    if case.bar < 0:
        weights.b_enc.fill_(50.0)
    if weights.W_skip is not None:
        weights.W_skip.copy_(normal(d_out, d_in) / d_in**0.5)
    points = {"hook_out": HookPoint.MLP_OUT, "d_out": d_out, "has_skip": case.skip}
    k = case.k if case.activation is TOPK else None
    site = SiteInfo(0, HookPoint.MLP_IN, d_in, d_sae, case.activation, k, **points)
    weights.set_meta(site, 0b10, 1.4 * d_in**0.5)
    for table in (slot.full, slot.delta):
        set_row(table, 1, [])
        set_row(table, 2, random_clamps(d_sae, 6))
        set_row(table, 3, [(d_sae - 1, ClampKind.ABSOLUTE, 2.0**70, False)])
    return slot


def steered(slot: SAESlot, step: StepState, stream: list[torch.Tensor]) -> list:
    """What each tier writes, and how many tokens were limited."""
    workspace = kernel.SteeringWorkspace(step.max_tokens, [slot], DEVICE)
    source, *written = stream
    found = []
    for run in (kernel.full_reconstruction, kernel.sae_clamp):
        hidden, *others = (x.clone() for x in written)
        residual = others[0] if others else None
        run(slot, step, workspace, hidden, residual, source)
        found += [hidden, *others, slot.saturated.clone()]
    return found


def check(case: Case) -> None:
    torch.manual_seed(case.tokens + case.d_sae)
    slot = make_slot(case)
    step = make_step(case.tokens, case.tokens + 3, [1, 3, 2, 0], Tier.FULL)
    step.index[Tier.DELTA] = step.index[Tier.FULL].flip(0)
    step.flags[5 : case.tokens : 6] = 0b10
    source = normal(case.tokens, case.d_in).to(DTYPE)
    if case.tokens > 2:
        source[2] *= 100.0  # beyond the norm limit
    written = [
        normal(case.tokens, case.d_out).to(DTYPE) for _ in range(1 + case.two_streams)
    ]
    stream = [source, *written]
    expected = steered(slot, step, stream)
    assert not torch.equal(expected[0], written[0])

    def on_rank(shard: Shard) -> list:
        own_step = StepState(step.max_tokens, DEVICE)
        own_step.index.copy_(step.index)
        own_step.flags.copy_(step.flags)
        return steered(shared_slot(slot, shard), own_step, stream)

    for rank, found in enumerate(Lockstep(case.ranks).run(on_rank)):
        for at, (own, whole) in enumerate(zip(found, expected, strict=True)):
            assert torch.equal(own, whole), f"rank {rank}: result {at} differs"
    assert int(expected[-1]) > 0 or case.tokens < 5


@pytest.mark.parametrize(
    "case",
    [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)],
    ids=str,
)
def test_ranks_write_the_bits_of_one(case: Case) -> None:
    check(case)


@pytest.mark.skipif(INTERPRETED, reason="too large for the interpreter")
@pytest.mark.parametrize("case", WIDE, ids=str)
def test_ranks_write_the_bits_of_one_at_real_widths(case: Case) -> None:
    check(case)
