# SPDX-License-Identifier: Apache-2.0
"""Sizes of the workspace: pure functions of shapes, so no GPU is needed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm.config.steering import Activation
from vllm.model_executor.layers.steering_kernels import plan
from vllm.model_executor.layers.steering_kernels.plan import (
    LIST_MAX,
    dense_row_bytes,
    plan_chunks,
    plan_encode,
    plan_guess,
)
from vllm.model_executor.layers.steering_kernels.workspace import SteeringWorkspace
from vllm.model_executor.layers.steering_state import SAESlot, SAEWeights

META = torch.device("meta")


@settings(max_examples=300)
@given(
    tokens=st.integers(1, 20000),
    d_in=st.integers(8, 8192),
    d_out=st.integers(8, 8192),
    d_sae=st.integers(1, 300_000),
    max_clamps=st.integers(1, 512),
    itemsize=st.sampled_from([2, 4]),
    topk=st.booleans(),
)
def test_every_step_fits_and_no_list_is_shorter_than_its_limit(
    tokens: int,
    d_in: int,
    d_out: int,
    d_sae: int,
    max_clamps: int,
    itemsize: int,
    topk: bool,
) -> None:
    sizes = (tokens, d_in, d_out, d_sae, max_clamps, itemsize, topk)
    found = plan_chunks(*sizes)
    assert found.rows * found.num_chunks >= tokens
    assert min(d_sae, LIST_MAX) <= found.capacity <= d_sae
    assert found.rows * d_in * itemsize <= plan.MAX_GATHER_BYTES
    scores = 4 * d_sae * found.rows if topk else 0
    limit = plan.MAX_TOPK_BYTES if topk else plan.MAX_ENTRY_BYTES
    assert scores + found.capacity * found.rows * plan.ENTRY_BYTES <= limit
    dense = found.dense_rows * dense_row_bytes(d_in, d_out, d_sae)
    assert scores + dense <= limit
    assert (found.dense_rows > 0) == (d_sae > LIST_MAX)
    assert found.dense_rows <= found.rows


@pytest.mark.parametrize("itemsize", [2, 4])
def test_a_width_is_one_block_of_the_reduction_at_every_number_of_tokens_or_at_none(
    itemsize: int,
) -> None:
    """Triton adds the bias first where it is one block, and else last."""
    for d_in in range(1, 600):
        blocks = {
            plan_encode(tokens, itemsize, d_in).block_k
            for tokens in (1, 16, 17, 64, 65, 256, 8192)
        }
        assert len({d_in <= block for block in blocks}) == 1, d_in


@pytest.mark.parametrize("tokens", [1, 7, 64, 200, 256, 1000, 8192])
@pytest.mark.parametrize("topk", [False, True])
def test_a_workspace_has_room_for_every_shorter_step(tokens: int, topk: bool) -> None:
    kinds = frozenset({Activation.TOPK if topk else Activation.RELU})
    slot = SAESlot(SAEWeights(16384, 2304, torch.bfloat16, META), 3, 8, kinds)
    workspace = SteeringWorkspace(8192, [slot], META)
    assert workspace.nbytes <= 256 << 20
    views = workspace.buffers(slot, tokens, topk)
    assert views.plan.capacity >= LIST_MAX
    assert views.dense.shape[0] >= min(tokens, 128)
    assert views.dense.shape[1] == dense_row_bytes(2304, 2304, 16384)


@pytest.mark.parametrize("longest", [1, 8, 200, 256, 8192])
@pytest.mark.parametrize("topk", [False, True])
@pytest.mark.parametrize("shape", [(16384, 2304), (131072, 5376), (600, 64)])
def test_dense_tokens_of_a_short_step_leave_the_lists_as_they_are(
    longest: int, topk: bool, shape: tuple[int, int]
) -> None:
    kinds = frozenset({Activation.TOPK if topk else Activation.RELU})
    slot = SAESlot(SAEWeights(*shape, torch.bfloat16, META), 3, 8, kinds)
    workspace = SteeringWorkspace(longest, [slot], META)
    for tokens in {1, 8, 200, 256, longest}:
        if tokens > min(longest, 256):
            continue
        views = workspace.buffers(slot, tokens, topk, LIST_MAX)
        assert len(views.entries) == tokens
        assert len(views.dense) >= 1
        end_of_lists = views.entries.storage_offset() + views.entries.numel()
        assert views.dense.storage_offset() >= plan.ENTRY_BYTES * end_of_lists
        end = views.dense.storage_offset() + views.dense.numel()
        assert end <= workspace._shared.numel()


# TopK goes through this workspace 2048 tokens at a time; 2051 are two chunks of 1280.
@pytest.mark.parametrize("longest", [2047, 2048, 2051, 2560, 5000])
@pytest.mark.parametrize("topk", [False, True])
def test_a_step_of_one_chunk_may_be_wider_than_the_chunks_of_the_longest(
    longest: int, topk: bool
) -> None:
    kinds = frozenset({Activation.TOPK if topk else Activation.RELU})
    slot = SAESlot(SAEWeights(16384, 2304, torch.bfloat16, META), 3, 8, kinds)
    workspace = SteeringWorkspace(longest, [slot], META)
    assert workspace.nbytes <= 256 << 20
    for tokens in {1, 1280, 1281, 2047, 2048, 2049, longest}:
        if tokens <= longest:
            views = workspace.buffers(slot, tokens, topk)
            assert views.x.shape[0] == views.plan.rows <= workspace.tokens.shape[0]
            assert len(workspace.records) >= views.plan.rows


@settings(max_examples=300)
@given(
    tokens=st.integers(1, 20000),
    d_model=st.integers(8, 8192),
    d_sae=st.integers(1, 300_000),
    max_clamps=st.integers(1, 512),
)
def test_a_guess_takes_what_scores_do_not_fit_and_keeps_the_limits(
    tokens: int, d_model: int, d_sae: int, max_clamps: int
) -> None:
    sizes = (d_model, d_model, d_sae, max_clamps, 2)
    found = plan_guess(tokens, *sizes)
    stored = plan_chunks(tokens, *sizes, topk=True)
    if found is None:
        assert stored.num_chunks == 1 or d_sae < plan.GUESS_LEAST
        return
    assert stored.num_chunks > 1
    assert found.rows * found.num_chunks >= tokens
    assert found.rows * d_model * 2 <= plan.MAX_GATHER_BYTES
    row_bytes = 2 * plan.GUESS_SAMPLE + 8 * plan.GUESS_CAPACITY + 4
    assert found.rows * row_bytes <= plan.MAX_TOPK_BYTES


@pytest.mark.parametrize("longest", [511, 513, 2051, 8192])
def test_a_workspace_has_room_for_every_shorter_guess(longest: int) -> None:
    kinds = frozenset({Activation.TOPK})
    slot = SAESlot(SAEWeights(65536, 64, torch.bfloat16, META), 3, 8, kinds)
    workspace = SteeringWorkspace(longest, [slot], META)
    assert workspace.nbytes <= 256 << 20
    guessed = 0
    for tokens in {1, 512, 513, 1280, 2047, 2050, 8191, longest}:
        found = workspace.guess_buffers(slot, tokens) if tokens <= longest else None
        if found is None:
            continue
        guessed += 1
        rows = found.stages.plan.rows
        assert found.stages.x.shape == (rows, 64)
        assert found.stages.entries.shape == (rows, plan.GUESS_CAPACITY)
        assert found.stages.coef.shape == (rows, 8)
        assert found.samples.shape == (rows, plan.GUESS_SAMPLE)
        assert len(found.bars) >= rows and len(found.failed) == tokens
        assert len(workspace.records) >= rows
        ends = [
            x.storage_offset() * x.element_size() + x.numel() * x.element_size()
            for x in (found.samples, found.bars)
        ]
        starts = [
            x.storage_offset() * x.element_size()
            for x in (found.bars, found.stages.entries)
        ]
        assert ends[0] <= starts[0] and ends[1] <= starts[1]
    assert (guessed > 0) == (longest > 512)
