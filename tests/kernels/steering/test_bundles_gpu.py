# SPDX-License-Identifier: Apache-2.0
"""What the CUDA ops are given is made once for a slot and a length of step."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

pytest.importorskip("triton")

from steering_reference import DTYPE, make_slot, make_step, needs_gpu

from vllm.config.steering import Activation, Tier
from vllm.model_executor.layers import (
    sae_full_reconstruction_kernel as kernel,
)
from vllm.model_executor.layers.steering_kernels import bundles
from vllm.model_executor.layers.steering_kernels.kept import MOST, Kept
from vllm.model_executor.layers.steering_kernels.run import Run
from vllm.model_executor.layers.steering_read_state import ReadBuffers
from vllm.model_executor.layers.steering_state import SAESlot

pytestmark = [pytest.mark.gpu, needs_gpu]
TOKENS = 12


@pytest.fixture
def slots() -> list[SAESlot]:
    """One of each pipeline, and one that may hold both."""
    both = frozenset({Activation.JUMPRELU, Activation.TOPK})
    return [make_slot(64, 32, activations=kinds) for kinds in (None, None, both)]


def runs(slots: list[SAESlot]) -> list[Run]:
    """Runs that differ in what their bundles must hold."""
    step = make_step(TOKENS, TOKENS, [1], Tier.FULL)
    workspace = kernel.SteeringWorkspace(TOKENS, slots, step.index.device)
    device = step.index.device
    reads = ReadBuffers(3, 8, TOKENS, 64, device)
    passages = [
        kernel.FULL,
        kernel.DELTA,
        kernel.Passage(Tier.FULL, reads),
        kernel.Passage(Tier.FULL, reads, edits=False),
    ]
    found = []
    for slot in slots:
        for tokens in (5, TOKENS):
            hidden = torch.zeros(tokens, 32, dtype=DTYPE, device=device)
            for passage in passages:
                for topk in (False, True) if slot is slots[-1] else (False,):
                    run = kernel._make_run(
                        slot, step, workspace, passage, topk, hidden, None, None
                    )
                    assert run is not None
                    found.append(run)
    return found


def places(held: bundles.Held) -> list[list[tuple[int, torch.Size, torch.dtype]]]:
    """Where the tensors are, and what they look like."""
    return [
        [(t.data_ptr(), t.shape, t.dtype) for t in bundle]
        for bundle in (held.step, held.weights, held.workspace)
    ]


def test_what_is_held_is_of_the_run(slots: list[SAESlot]) -> None:
    made = runs(slots)
    for _ in range(2):
        for run in made:
            held = bundles.run_held(run)
            assert places(held) == places(bundles._make_run_held(run))
    assert len(made[0].workspace.held) == len(made)


def test_rows_of_a_second_run_are_its_own(slots: list[SAESlot]) -> None:
    run = runs(slots)[0]
    first = bundles.run_held(run)
    rows = torch.ones(TOKENS, dtype=torch.int32, device=run.hidden.device)
    second = bundles.run_held(replace(run, own_index=rows))
    assert second.step[0] is rows
    assert first.step[0] is not rows
    # A view that is made anew in each step is the same place.
    assert bundles.run_held(replace(run, own_index=rows[:])) is second
    assert bundles.run_held(replace(run, own_index=rows[1:])) is not second
    assert bundles.run_held(run) is first


def test_at_most_so_many_are_kept() -> None:
    kept: Kept[int, list[int]] = Kept()
    first = kept.get(0, lambda: [0])
    assert kept.get(0, lambda: [1]) is first
    for key in range(1, MOST + 1):
        kept.get(key, partial(list, [key]))
    assert len(kept) == 1
    assert kept.get(0, lambda: [2]) == [2]
