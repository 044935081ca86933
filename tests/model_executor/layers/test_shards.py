# SPDX-License-Identifier: Apache-2.0
"""Ranks that share an SAE compute the bits that one rank computes."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from steering_testing.shards import on_ranks, shared_slot
from steering_testing.sites import CPU

from vllm.config.steering import Activation, SiteInfo, Tier
from vllm.config.steering_points import HookPoint
from vllm.model_executor.layers.steering_clamp_table import ClampTable
from vllm.model_executor.layers.steering_read_state import TABLE_HEAD, ReadBuffers
from vllm.model_executor.layers.steering_reference_backend import ReferenceBackend
from vllm.model_executor.layers.steering_shards import WHOLE, Shard
from vllm.model_executor.layers.steering_state import (
    CONDITION_SHIFT,
    ONLY_IF_ACTIVE,
    ClampFlag,
    ClampKind,
    SAESlot,
    SAEWeights,
    StepState,
)
from vllm.model_executor.layers.steering_stream import Stream

F, D = 256, 128
MAX_CLAMPS = 8


@dataclass(frozen=True)
class Case:
    """`density` is about the share of features that fire (TopK: of k in F)."""

    tokens: int
    activation: Activation
    density: float
    dtype: torch.dtype = torch.float32
    transcoder: bool = False


def cases(tokens: tuple[int, ...]) -> list[Case]:
    every = itertools.product(tokens, Activation, (0.0, 0.05, 1.0))
    plain = [Case(*chosen) for chosen in every]
    others = [
        Case(9, Activation.JUMPRELU, 0.1, torch.bfloat16),
        Case(9, Activation.TOPK, 0.1, torch.bfloat16),
        Case(9, Activation.RELU, 0.5, transcoder=True),
        Case(9, Activation.TOPK, 0.2, transcoder=True),
    ]
    return plain + others


def fill_tables(slot: SAESlot) -> None:
    """Rows of every kind of clamp, of features of every rank, and reads."""
    absolute, additive, scale = (
        ClampKind.ABSOLUTE,
        ClampKind.ADDITIVE,
        ClampKind.SCALE,
    )
    above = ClampKind.CONDITION | ClampFlag.IF_ABOVE
    needs_last = 5 << CONDITION_SHIFT
    rows = [
        [],
        [(F - 1, absolute, 3.0), (0, scale, -2.0), (130, additive, 1.5)],
        [
            (5, absolute | ONLY_IF_ACTIVE, 2.0),
            (200, scale | needs_last, 0.0),
            (3, additive | needs_last, 2.0),
            (66, absolute, 1.0),
            (190, above, 0.01),
        ],
        [(7, additive, 2.0**70)],
    ]
    for table in (slot.full, slot.delta):
        for row, clamps in enumerate(rows, start=1):
            write_row(table, row, clamps)
    assert slot.reads is not None
    for row, (top_k, given) in enumerate([(8, []), (0, [0, 127, 128, F - 1])], 1):
        packed = torch.tensor([1, 0, top_k, len(given), *given], dtype=torch.int32)
        slot.reads.packed[row, : TABLE_HEAD + len(given)] = packed


def write_row(
    table: ClampTable, row: int, clamps: list[tuple[int, int, float]]
) -> None:
    table.active[row] = 1
    table.count[row] = len(clamps)
    for at, (feature, code, value) in enumerate(clamps):
        table.feature[row, at] = feature
        table.code[row, at] = code
        table.value[row, at] = value


def make_slot(case: Case) -> SAESlot:
    """A random SAE with its tables filled."""
    d_out = D // 2 if case.transcoder else D
    weights = SAEWeights(F, D, case.dtype, CPU, d_out, case.transcoder)
    for name in ("W_enc", "W_dec", "b_enc", "b_dec", "W_skip"):
        if (tensor := getattr(weights, name)) is not None:
            tensor.copy_(torch.randn(tensor.shape) / D**0.5)
    # Ties between features of different ranks: two rows with equal scores.
    weights.W_enc[F - 1], weights.b_enc[F - 1] = weights.W_enc[1], weights.b_enc[1]
    is_topk = case.activation is Activation.TOPK
    quantile = torch.special.ndtri(torch.tensor(1 - case.density).clamp(1e-6, 1 - 1e-6))
    weights.threshold.fill_(float(quantile))
    if case.density == 1.0:
        weights.threshold.zero_()
        weights.b_enc.fill_(100.0)
    k = max(int(case.density * F), 1) if is_topk else None
    hook_out = HookPoint.MLP_OUT if case.transcoder else None
    hook = HookPoint.MLP_IN if case.transcoder else HookPoint.POST_BLOCK
    site = SiteInfo(0, hook, D, F, case.activation, k, hook_out=hook_out, d_out=d_out)
    weights.set_meta(site, 2, norm_limit=1.3 * D**0.5)
    kinds = frozenset({case.activation})
    slot = SAESlot(weights, 5, MAX_CLAMPS, kinds, case.transcoder)
    slot.reads = ReadBuffers(5, MAX_CLAMPS, case.tokens, F, CPU)
    fill_tables(slot)
    return slot


@dataclass
class Step:
    """A step and its stream, with tokens that a norm or an id bypasses."""

    state: StepState
    hidden: torch.Tensor
    residual: torch.Tensor
    source: torch.Tensor | None


def make_step(case: Case) -> Step:
    state = StepState(case.tokens, CPU)
    rows = torch.arange(case.tokens, dtype=torch.int32)
    state.index[Tier.DELTA] = (rows + 2) % 5
    state.index[Tier.FULL] = (rows + 1) % 5
    state.read_index[:] = rows % 3
    state.reading = True
    state.flags[:] = (rows % 7 == 3) * 2
    d_out = D // 2 if case.transcoder else D
    hidden, residual = (
        torch.randn(case.tokens, d_out).to(case.dtype) / 2**0.5 for _ in range(2)
    )
    source = torch.randn(case.tokens, D).to(case.dtype) if case.transcoder else None
    read = residual if source is None else source
    for at, wide in ((2, 100.0), (4, float("nan"))):
        if at < case.tokens:
            read[at] *= wide
    return Step(state, hidden, residual, source)


def steered(slot: SAESlot, step: Step) -> list[torch.Tensor]:
    """All that the tiers and reading write, one after another."""
    state, source = step.state, step.source
    backend = ReferenceBackend(state)
    hidden, residual = step.hidden.clone(), step.residual.clone()
    stream = Stream(hidden, residual, source)
    backend.sae_clamp(slot, stream)
    after_delta = [hidden.clone(), residual.clone()]
    backend.read_and_reconstruct(slot, stream)
    assert slot.reads is not None
    return [*after_delta, hidden, residual, slot.reads.out, slot.saturated]


def check_cases(chosen: list[Case], shard: Shard) -> None:
    """On each rank: the shared SAE's results are those of the whole one."""
    for seed, case in enumerate(chosen):
        torch.manual_seed(seed)
        slot, step = make_slot(case), make_step(case)
        expected = steered(slot, step)
        assert not torch.equal(expected[1], step.residual) or case.tokens == 1
        found = steered(shared_slot(slot, shard), step)
        for at, (mine, whole) in enumerate(zip(found, expected, strict=True)):
            same = (mine == whole) | ((mine != mine) & (whole != whole))
            assert same.all(), f"{case}: result {at} differs on rank {shard.rank}"


def test_two_ranks_write_the_bits_of_one(tmp_path: Path) -> None:
    on_ranks(2, tmp_path, functools.partial(check_cases, cases((1, 5))))


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_write_the_bits_of_one_at_every_width(size: int, tmp_path: Path) -> None:
    chosen = cases((1, 2, 3, 17, 64, 300, 600))
    on_ranks(size, tmp_path, functools.partial(check_cases, chosen))


def test_a_rank_holds_its_part() -> None:
    weights = SAEWeights(F, D, torch.bfloat16, CPU, shard=Shard(1, 4))
    whole = SAEWeights(F, D, torch.bfloat16, CPU)
    assert weights.own == slice(64, 128) and weights.columns == slice(32, 64)
    large = [weights.W_enc, weights.W_dec]
    assert sum(t.nbytes for t in large) == (whole.W_enc.nbytes + whole.W_dec.nbytes) / 4
    assert whole.shard is WHOLE and whole.row_norms is None
    with pytest.raises(ValueError, match="expected a multiple of 3"):
        Shard(0, 3).part(F)
