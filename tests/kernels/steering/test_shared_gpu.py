# SPDX-License-Identifier: Apache-2.0
"""Ranks that share an SAE write the bits of one rank: the Triton stages, with ranks
that take turns on one device."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from lockstep import Lockstep
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
from steering_testing.shards import shared_slot

from vllm.config.steering import Activation, Tier
from vllm.model_executor.layers import sae_full_reconstruction_kernel as kernel
from vllm.model_executor.layers.steering_kernels.plan import LIST_MAX, RECORD_INTS
from vllm.model_executor.layers.steering_shards import Shard
from vllm.model_executor.layers.steering_state import (
    CONDITION_SHIFT,
    ClampFlag,
    ClampKind,
    SAESlot,
    StepState,
)

if kernel.HAS_TRITON:
    from vllm.model_executor.layers.steering_kernels.shared import order_dense_kernel

DENSE = 4  # int of a record: index of the n-th dense token
pytestmark = [needs_gpu, pytest.mark.usefixtures("triton_alone")]
JUMP, TOPK = Activation.JUMPRELU, Activation.TOPK
TIERS = (Tier.FULL, Tier.DELTA)


@dataclass(frozen=True)
class Case:
    """`l0`: features that fire on average, and TopK's k."""

    tokens: int
    d_sae: int
    d_model: int
    activation: Activation
    l0: int
    ranks: int = 2
    dtype: torch.dtype = DTYPE
    two_streams: bool = True


CASES = [
    Case(5, 64, 64, JUMP, 12),
    Case(3, 64, 64, TOPK, 8, two_streams=False),
    Case(3, 1280, 32, JUMP, 700),  # dense: more than a list holds
    Case(2, 1280, 64, JUMP, LIST_MAX - 8, ranks=4),  # on either side of it
    Case(3, 1280, 32, TOPK, 600),
    Case(20, 128, 96, JUMP, 20, dtype=torch.float32),
    Case(4, 128, 64, TOPK, 5, ranks=4, dtype=torch.float32),
]
WIDE = [
    Case(tokens, 16384, 2304, activation, l0, ranks)
    for tokens in (1, 64, 300, 2048)
    for activation in (JUMP, TOPK)
    for l0 in (64, 1000)
    for ranks in (2, 4)
]


def add_condition(slot: SAESlot, row: int) -> None:
    """The first clamp of a row needs that the last feature is active."""
    for table in (slot.full, slot.delta):
        at = int(table.count[row])
        table.feature[row, at] = slot.weights.d_sae_capacity - 1
        table.code[row, at] = ClampKind.CONDITION | ClampFlag.IF_ABOVE
        table.value[row, at] = 0.01
        table.code[row, 0] += (at + 1) << CONDITION_SHIFT
        table.count[row] = at + 1


def make_case(case: Case) -> tuple[SAESlot, StepState]:
    slot = make_slot(
        case.d_sae,
        case.d_model,
        case.activation,
        k=case.l0,
        l0=float(case.l0),
        dtype=case.dtype,
        norm_limit=1.4 * case.d_model**0.5,
        skip_mask=2,
    )
    for table in (slot.full, slot.delta):
        for row in (1, 2, 3):
            set_row(table, row, random_clamps(case.d_sae, 2 * row))
        set_row(table, 4, [(1, ClampKind.ABSOLUTE, 2.0**70, False)])
    add_condition(slot, 3)
    step = make_step(case.tokens, case.tokens + 3, [1, 3, 2, 0, 4], Tier.FULL)
    step.index[Tier.DELTA] = step.index[Tier.FULL].flip(0).roll(-3)
    step.flags[6 : case.tokens : 7] = 2
    return slot, step


Streams = list[torch.Tensor]


def steered(slot: SAESlot, step: StepState, stream: Streams) -> Streams:
    """What each tier writes, and how many tokens were limited."""
    workspace = kernel.SteeringWorkspace(step.max_tokens, [slot], DEVICE)
    found: Streams = []
    for tier in TIERS:
        hidden, *others = (x.clone() for x in stream)
        residual = others[0] if others else None
        run = kernel.full_reconstruction if tier is Tier.FULL else kernel.sae_clamp
        run(slot, step, workspace, hidden, residual)
        found += [hidden, *others, slot.saturated.clone()]
    return found


def check(case: Case, device: torch.device | None = None) -> None:
    """`device`: the ranks exchange through their memory there."""
    torch.manual_seed(case.tokens + case.l0)
    slot, step = make_case(case)
    stream = [
        x
        for x in make_stream(case.tokens, case.d_model, case.dtype, case.two_streams)
        if x is not None
    ]
    if case.tokens >= 5:
        stream[-1][2] *= 100.0  # beyond the norm limit
    expected = steered(slot, step, stream)
    assert not torch.equal(expected[0], stream[0])
    saturated = slot.saturated.clone()

    def on_rank(shard: Shard) -> Streams:
        own_step = StepState(step.max_tokens, DEVICE)
        own_step.index.copy_(step.index)
        own_step.flags.copy_(step.flags)
        return steered(shared_slot(slot, shard), own_step, stream)

    for rank, found in enumerate(Lockstep(case.ranks).run(on_rank, device)):
        assert len(found) == len(expected)
        for at, (own, whole) in enumerate(zip(found, expected, strict=True)):
            assert torch.equal(own, whole), f"rank {rank}: result {at} differs"
    assert int(saturated) > 0 or case.tokens < 5


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ranks_write_the_bits_of_one(case: Case) -> None:
    check(case)


def test_dense_tokens_have_the_same_places_on_every_rank() -> None:
    """Whatever the order in which programs have noted them."""
    n = 2050
    listed = torch.randint(0, 2 * LIST_MAX, (n,), dtype=torch.int32, device=DEVICE)
    tokens = torch.arange(n, dtype=torch.int32, device=DEVICE)
    tokens[::5] = -1
    expected = ((listed > LIST_MAX) & (tokens >= 0)).nonzero().squeeze(1)
    for seed in range(2):
        records = torch.zeros(n, RECORD_INTS, dtype=torch.int32, device=DEVICE)
        records[:, 0] = listed
        torch.manual_seed(seed)
        noted = expected[torch.randperm(len(expected), device=DEVICE)]
        records[: len(noted), DENSE] = noted.to(torch.int32)
        order_dense_kernel[(1,)](
            count=torch.tensor([n], dtype=torch.int32, device=DEVICE),
            tokens=tokens,
            records=records,
            base=0,
            rows=n,
            LIST_MAX=LIST_MAX,
            BLOCK=1024,
        )
        assert torch.equal(records[: len(noted), DENSE].long(), expected)
        assert torch.equal(records[:, 0], listed)


@pytest.mark.skipif(INTERPRETED, reason="too large for the interpreter")
@pytest.mark.parametrize("case", WIDE, ids=str)
def test_ranks_write_the_bits_of_one_at_real_widths(case: Case) -> None:
    check(case)
