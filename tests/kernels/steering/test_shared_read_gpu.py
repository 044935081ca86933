# SPDX-License-Identifier: Apache-2.0
"""Ranks that share an SAE read what one rank reads: the Triton stages, with ranks that
take turns on one device."""

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
    make_slot,
    make_stream,
    needs_gpu,
)
from steering_testing.shards import shared_slot

from vllm.config.sae_features import NOT_READ
from vllm.config.steering import Activation
from vllm.model_executor.layers import sae_readout_kernel as kernel
from vllm.model_executor.layers.steering_kernels import stages_shared_read
from vllm.model_executor.layers.steering_read_state import ReadBuffers
from vllm.model_executor.layers.steering_shards import Shard
from vllm.model_executor.layers.steering_state import SAESlot, StepState

pytestmark = [
    pytest.mark.gpu,
    needs_gpu,
    pytest.mark.usefixtures("triton_alone"),
]
JUMP, TOPK = Activation.JUMPRELU, Activation.TOPK


@dataclass(frozen=True)
class Case:
    """`l0`: features that fire on average, and TopK's k; `max_read`: of a row."""

    tokens: int
    d_sae: int
    activation: Activation
    l0: int
    ranks: int = 2
    two_streams: bool = True
    mixed: bool = False
    max_read: int = 64


CASES = [
    Case(11, 128, JUMP, 20),
    Case(6, 128, JUMP, 100, ranks=4, two_streams=False),  # more than 64 on each rank
    Case(5, 128, JUMP, 1, ranks=4),  # ranks without a feature that fires
    Case(9, 128, JUMP, 20, mixed=True),
    Case(9, 128, TOPK, 12, mixed=True),
    Case(7, 128, TOPK, 90, ranks=4),
    Case(5, 192, JUMP, 150, max_read=100),
]
WIDE = [
    Case(tokens, 16384, activation, l0, ranks)
    for tokens in (1, 64, 300)
    for activation in (JUMP, TOPK)
    for l0 in (64, 400)
    for ranks in (2, 4)
]


def readable(case: Case) -> SAESlot:
    """A slot with reading rows: features of every rank, the largest, and both."""
    kinds = frozenset({JUMP, TOPK}) if case.mixed else None
    slot = make_slot(
        case.d_sae,
        64,
        case.activation,
        k=case.l0,
        l0=float(case.l0),
        skip_mask=2,
        norm_limit=11.0,
        max_clamps=64,
        activations=kinds,
    )
    table, last = slot.full, case.d_sae - 1
    shape = (table.num_rows, table.max_clamps, case.tokens + 3, case.d_sae)
    reads = ReadBuffers(*shape, DEVICE, case.max_read)
    rows = {
        1: (16, []),
        2: (0, [0, 3, last // 2, last]),
        3: (5, [1, last]),
        4: (case.max_read, []),
    }
    for row, (top_k, features) in rows.items():
        words = [1, 0, top_k, len(features), *features]
        reads.packed[row, : len(words)] = torch.tensor(words, dtype=torch.int32)
    reads.scale.copy_(0.5 + torch.rand(case.d_sae, device=DEVICE))
    slot.reads = reads
    return slot


def make_step(case: Case) -> StepState:
    step = StepState(case.tokens + 3, DEVICE)
    cycle = torch.tensor([1, 2, 0, 3, 4], dtype=torch.int32).repeat(case.tokens)
    step.read_index[: case.tokens] = cycle[: case.tokens].to(DEVICE)
    step.flags[5 : case.tokens : 6] = 2
    step.reading = True
    return step


def read(slot: SAESlot, step: StepState, stream: list[torch.Tensor]) -> torch.Tensor:
    """What reading writes; nothing else may change."""
    assert slot.reads is not None
    workspace = kernel.SteeringWorkspace(step.max_tokens, [slot], DEVICE)
    hidden, *others = (x.clone() for x in stream)
    residual = others[0] if others else None
    kernel.read_features(slot, step, workspace, hidden, residual)
    assert all(map(torch.equal, [hidden, *others], stream))
    return slot.reads.out.clone()


def check(case: Case) -> None:
    torch.manual_seed(case.tokens + case.l0)
    slot = readable(case)
    streams = make_stream(case.tokens, 64, DTYPE, case.two_streams)
    stream = [x for x in streams if x is not None]
    expected = read(slot, make_step(case), stream)
    was_read = (expected[:, 0] != NOT_READ).sum()
    assert 0 < was_read < case.tokens or case.tokens == 1

    def on_rank(shard: Shard) -> torch.Tensor:
        own = shared_slot(slot, shard)
        return read(own, make_step(case), stream)

    for rank, found in enumerate(Lockstep(case.ranks).run(on_rank)):
        same = (found == expected).all(dim=1)
        assert same.all(), (rank, found[~same][0], expected[~same][0])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ranks_read_what_one_reads(case: Case) -> None:
    check(case)


def test_a_long_step_is_joined_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages_shared_read, "MERGED_KEYS", 4 * 2 * 64)
    assert stages_shared_read.merged_at_once(2, 64) == 4
    check(CASES[0])


@pytest.mark.skipif(INTERPRETED, reason="too large for the interpreter")
@pytest.mark.parametrize("case", WIDE, ids=str)
def test_ranks_read_what_one_reads_at_real_widths(case: Case) -> None:
    check(case)
