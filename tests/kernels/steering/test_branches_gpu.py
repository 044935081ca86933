# SPDX-License-Identifier: Apache-2.0
"""A captured step of several modules at one site runs those that have tokens."""

from __future__ import annotations

import os
from collections.abc import Sequence

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
    random_clamps,
    set_row,
)

from vllm.config.steering import Activation, Tier
from vllm.model_executor.layers.steering_kernel_backend import (
    KernelBackend,
)
from vllm.model_executor.layers.steering_kernels import branches
from vllm.model_executor.layers.steering_read_state import ReadBuffers
from vllm.model_executor.layers.steering_state import (
    SAESlot,
    StepState,
)
from vllm.model_executor.layers.steering_stream import Stream

os.environ.setdefault(branches.BRANCHES_ENV, "1")
CAN = not INTERPRETED and torch.cuda.is_available() and branches.can_branch(DEVICE)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not CAN, reason="needs conditional nodes and the extension"),
]
KINDS = 2 * [Activation.JUMPRELU, Activation.TOPK, Activation.RELU]
WIDTH, FEATURES = 72, 600


def make_slots(reads: bool) -> list[SAESlot]:
    """Row i + 1 is of slot i; the odd ones have clamps."""
    slots = [make_slot(FEATURES, WIDTH, kind, k=9, l0=20) for kind in KINDS]
    for at, slot in enumerate(slots):
        set_row(slot.full, at + 1, random_clamps(FEATURES, 4) if at % 2 else [])
        if reads:
            slot.reads = ReadBuffers(9, 8, 300, FEATURES, DEVICE)
            own = torch.tensor([1, 0, 16, 0], dtype=torch.int32)
            slot.reads.packed[at + 1, :4] = own
    return slots


def rows_of(case: str, tokens: int) -> torch.Tensor:
    """Rows of the step's tokens: of no module, of one, of two, of all."""
    rows = torch.zeros(tokens, dtype=torch.int32, device=DEVICE)
    if case.isdigit():
        rows[:] = int(case) + 1
    if case == "two":
        rows[::3], rows[1::3] = 1, 3
    if case == "all":
        rows[:] = 1 + torch.arange(tokens, device=DEVICE) % len(KINDS)
    return rows


CASES = ["none", "1", "all", "0", "two", "none", "2", "5"]
Streams = tuple[torch.Tensor, torch.Tensor]


def run(backend: KernelBackend, slots: Sequence[SAESlot], x: Streams) -> None:
    backend.full_tier(slots, Stream(*x))


@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("tokens", [1, 40, 256, 300])
def test_a_graph_does_what_the_launches_do(tokens: int, reads: bool) -> None:
    slots = make_slots(reads)
    step = make_step(tokens, 300, [0], Tier.FULL)
    step.reading = reads
    backend = KernelBackend(step, slots, [], DTYPE)
    assert branches.fits(slots) and backend.branches is not None
    clean = make_stream(tokens, WIDTH, DTYPE)
    assert clean[1] is not None
    now = (clean[0].clone(), clean[1].clone())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(backend, slots, now)
    for case in CASES:
        step.index.zero_()
        step.read_index.zero_()
        step.index[Tier.FULL, :tokens] = rows_of(case, tokens)
        if reads:
            step.read_index[:tokens] = rows_of(
                "two" if case == "none" else case, tokens
            )
        found: list[list[torch.Tensor]] = []
        for once in (lambda: run(backend, slots, now), graph.replay, graph.replay):
            restore(slots, now, (clean[0], clean[1]))
            once()
            torch.cuda.synchronize()
            results = [*now, *(s.reads.out for s in slots if s.reads is not None)]
            found.append([t.clone() for t in results])
        for replayed in found[1:]:
            for one, other in zip(found[0], replayed, strict=True):
                assert torch.equal(one, other), case
        changed = not torch.equal(found[0][1], clean[1])
        assert changed == (case != "none")
    assert not step.sync.any()


def restore(slots: Sequence[SAESlot], now: Streams, clean: Streams) -> None:
    for own, before in zip(now, clean, strict=True):
        own.copy_(before)
    for slot in slots:
        if slot.reads is not None:
            slot.reads.out.zero_()


def test_which_sites_have_branches() -> None:
    slots = make_slots(reads=False)
    assert branches.fits(slots)
    assert not branches.fits(slots[:-1])  # too few
    slots[0].reads = ReadBuffers(9, 8, 300, FEATURES, DEVICE)
    assert not branches.fits(slots)


def test_other_steps_launch_every_module() -> None:
    slots = make_slots(reads=False)
    step: StepState = make_step(5, 300, [0], Tier.FULL)
    backend = KernelBackend(step, slots, [], DTYPE)
    step.index[Tier.FULL, :5] = 4
    clean = make_stream(5, WIDTH, DTYPE)
    assert clean[1] is not None
    now = (clean[0].clone(), clean[1].clone())
    run(backend, slots, now)
    assert not torch.equal(now[1], clean[1])
