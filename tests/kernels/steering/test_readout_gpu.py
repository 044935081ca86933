# SPDX-License-Identifier: Apache-2.0
"""Reading features on the GPU, against float64 and against plain PyTorch.

`TRITON_INTERPRET=1` runs the small ones on a CPU that has Triton.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from steering_reference import (
    DEVICE,
    DTYPE,
    INTERPRETED,
    activations,
    make_slot,
    make_stream,
    needs_gpu,
    set_row,
    settle,
    stream,
)

from vllm.config.sae_features import NOT_READ
from vllm.config.steering import Activation, Tier
from vllm.model_executor.layers import sae_readout_kernel as kernel
from vllm.model_executor.layers.steering_kernels import stages_triton_read
from vllm.model_executor.layers.steering_kernels.plan import (
    LIST_MAX,
    ChunkPlan,
)
from vllm.model_executor.layers.steering_kernels.run import Run
from vllm.model_executor.layers.steering_read_state import TABLE_HEAD, ReadBuffers
from vllm.model_executor.layers.steering_state import (
    ClampKind,
    MetaField,
    SAESlot,
    StepState,
)

pytestmark = [
    pytest.mark.gpu,
    needs_gpu,
    pytest.mark.usefixtures("implementation"),
]

LEAST_CAPACITY = 128  # 64 values of a row, and a block of features
BREADTH = pytest.mark.slow
KINDS = [Activation.RELU, Activation.JUMPRELU, Activation.TOPK]
# Row -> (top_k, given features).
ROWS: dict[int, tuple[int, list[int]]] = {
    1: (16, []),
    2: (0, [0, 3, 17, 60]),
    3: (5, [1, 2]),
    4: (64, []),
}


def readable(
    slot: SAESlot,
    max_tokens: int,
    rows: dict[int, tuple[int, list[int]]] = ROWS,
    max_read: int = 64,
) -> ReadBuffers:
    """Give the slot reading buffers with some rows."""
    table = slot.full
    capacity = slot.weights.d_sae_capacity
    shape = (table.num_rows, table.max_clamps, max_tokens, capacity)
    reads = ReadBuffers(*shape, DEVICE, max_read)
    for row, (top_k, features) in rows.items():
        words = [1, 0, top_k, len(features), *features]
        reads.packed[row, : len(words)] = torch.tensor(words, dtype=torch.int32)
    reads.scale.copy_(0.5 + torch.rand(capacity, device=DEVICE))
    slot.reads = reads
    return reads


def read(
    slot: SAESlot, tokens: int, rows: list[int], two_streams: bool = True
) -> tuple[StepState, torch.Tensor]:
    """Run the kernels on a random stream; the step and the stream `[T, D]`."""
    step = StepState(tokens + 3, DEVICE)
    cycle = torch.tensor(rows, dtype=torch.int32).repeat(tokens // len(rows) + 1)
    step.read_index[:tokens] = cycle[:tokens].to(DEVICE)
    step.reading = True
    hidden, residual = make_stream(tokens, slot.weights.d_in, DTYPE, two_streams)
    x = stream(hidden, residual)
    # `settle` takes the rows of near ties from a tier: here from reading.
    step.index[Tier.FULL] = step.read_index
    settle(slot, step, Tier.FULL, x)
    step.read_index.copy_(step.index[Tier.FULL])
    workspace = kernel.SteeringWorkspace(tokens + 3, [slot], DEVICE)
    before = hidden.clone(), None if residual is None else residual.clone()
    kernel.read_features(slot, step, workspace, hidden, residual)
    assert torch.equal(hidden, before[0])
    assert residual is None or torch.equal(residual, before[1])
    return step, x


def check(
    slot: SAESlot,
    step: StepState,
    x: torch.Tensor,
    rows: dict[int, tuple[int, list[int]]] = ROWS,
) -> None:
    """Every row of the output holds what its token asks, and no other is written."""
    reads = slot.reads
    assert reads is not None
    out = reads.out.cpu()
    bits = out.view(torch.float32)
    acts = activations(slot, x).cpu()
    values = acts * reads.scale.double().cpu()
    tolerance = 2e-3
    for t in range(x.shape[0]):
        row = int(step.read_index[t])
        norm = float(x[t].double().norm())
        if row == 0 or norm > float(slot.weights.norm_limit):
            assert out[t, 0] == NOT_READ
            continue
        top_k, features = rows[row]
        active = int((acts[t] != 0).sum())
        assert out[t, 0] == active
        assert out[t, 1] == min(active, top_k)
        n, first = int(out[t, 1]), 2 + len(features)
        torch.testing.assert_close(
            bits[t, 2:first].double(),
            values[t, features],
            atol=tolerance,
            rtol=tolerance,
        )
        index = out[t, first : first + n].long()
        found = bits[t, first + top_k : first + top_k + n].double()
        assert len(set(index.tolist())) == n
        torch.testing.assert_close(
            found, values[t, index], atol=tolerance, rtol=tolerance
        )
        assert (found[1:] <= found[:-1]).all()
        listed = torch.where(acts[t] != 0, values[t], -torch.inf)
        best = listed.sort(descending=True).values[:n]
        torch.testing.assert_close(found, best, atol=tolerance, rtol=tolerance)
    assert (out[x.shape[0] :] == NOT_READ).all()


@pytest.mark.parametrize("tokens", [1, 7, 40])
@pytest.mark.parametrize("activation", KINDS)
def test_read_tokens_have_what_they_ask(activation: Activation, tokens: int) -> None:
    slot = make_slot(128, 64, activation, k=12, l0=20, max_clamps=64)
    readable(slot, tokens + 3)
    check(slot, *read(slot, tokens, [1, 0, 2, 3, 4]))


def test_a_single_stream_and_a_slot_of_both_kinds() -> None:
    kinds = frozenset(KINDS)
    for activation in (Activation.JUMPRELU, Activation.TOPK):
        slot = make_slot(
            128, 64, activation, max_clamps=64, capacity=160, activations=kinds
        )
        readable(slot, 13)
        check(slot, *read(slot, 10, [1, 2, 0], two_streams=False))


def test_topk_that_keeps_negative_scores() -> None:
    slot = make_slot(96, 64, Activation.TOPK, k=80, topk_relu=False, max_clamps=64)
    readable(slot, 9)
    check(slot, *read(slot, 6, [4, 2, 1]))


def test_tokens_past_the_norm_limit_and_flagged_ones_are_left_alone() -> None:
    slot = make_slot(96, 64, skip_mask=2, norm_limit=8.0, max_clamps=64)
    reads = readable(slot, 23)
    step, x = read(slot, 20, [1])
    check(slot, step, x)
    norms = x.double().norm(dim=1)
    assert (norms > 8).any() and (norms <= 8).any()
    step.flags[:20] = 2
    reads.out.fill_(NOT_READ)
    workspace = kernel.SteeringWorkspace(23, [slot], DEVICE)
    kernel.read_features(slot, step, workspace, x.contiguous(), None)
    assert (reads.out == NOT_READ).all()


@pytest.mark.parametrize("activation", KINDS)
def test_more_non_zeros_than_a_list_holds(
    activation: Activation, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = kernel.SteeringWorkspace.plan

    # The extension's lists are never shorter than what a block sorts.
    capacity = LEAST_CAPACITY if INTERPRETED else LIST_MAX
    d_sae, l0 = (320, 160) if INTERPRETED else (1500, 700)

    def narrow(slot: SAESlot, tokens: int, topk: bool) -> ChunkPlan:
        return replace(stock(slot, tokens, topk), capacity=capacity)

    monkeypatch.setattr(kernel.SteeringWorkspace, "plan", staticmethod(narrow))
    slot = make_slot(d_sae, 64, activation, k=l0 + 50, l0=l0, max_clamps=64)
    readable(slot, 9)
    step, x = read(slot, 6, [1, 2, 3, 4])
    check(slot, step, x)
    counts = slot.reads.out[:6, 0]
    was_read = counts != NOT_READ  # `settle` may have given a token's row up
    assert was_read.any()
    assert (counts[was_read] > capacity).all()


@pytest.mark.parametrize(
    "activation", [*KINDS[:2], pytest.param(Activation.TOPK, marks=BREADTH)]
)
@pytest.mark.parametrize(
    "d_in", [pytest.param(64, marks=BREADTH), pytest.param(136, marks=BREADTH), 200]
)
def test_what_is_read_does_not_depend_on_the_length_of_lists(
    activation: Activation, d_in: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lists are shorter in longer steps."""
    stock = kernel.SteeringWorkspace.plan
    short = LEAST_CAPACITY if INTERPRETED else LIST_MAX
    d_sae, l0 = (320, 160) if INTERPRETED else (1500, 700)
    slot = make_slot(d_sae, d_in, activation, k=l0, l0=l0, max_clamps=64)
    reads = readable(slot, 9)
    step, x = read(slot, 4, [3, 4])
    found = reads.out.clone()
    assert (found[:4, 0] > short).any()

    def narrow(slot: SAESlot, tokens: int, topk: bool) -> ChunkPlan:
        return replace(stock(slot, tokens, topk), capacity=short)

    monkeypatch.setattr(kernel.SteeringWorkspace, "plan", staticmethod(narrow))
    reads.out.fill_(NOT_READ)
    workspace = kernel.SteeringWorkspace(9, [slot], DEVICE)
    kernel.read_features(slot, step, workspace, x.contiguous(), None)
    assert torch.equal(reads.out, found)


@pytest.mark.parametrize(
    "activation", [pytest.param(Activation.RELU, marks=BREADTH), Activation.JUMPRELU]
)
def test_sums_that_begin_where_the_extension_begins_them(
    activation: Activation, triton_alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left of the extension's step, after Triton's stages."""
    stock, plan = stages_triton_read.read_out, kernel.SteeringWorkspace.plan
    capacity = LEAST_CAPACITY if INTERPRETED else LIST_MAX
    d_sae, l0 = (520, 300) if INTERPRETED else (1500, 700)

    def narrow(slot: SAESlot, tokens: int, topk: bool) -> ChunkPlan:
        return replace(plan(slot, tokens, topk), capacity=capacity)

    def after_cuda(run: Run, reads: ReadBuffers, base: int, overflow: bool) -> None:
        assert not overflow
        run.workspace.records[:, 1] = run.workspace.tokens  # as the extension does
        stock(run, reads, base, overflow=True)

    monkeypatch.setattr(kernel.SteeringWorkspace, "plan", staticmethod(narrow))
    monkeypatch.setattr(stages_triton_read, "read_out", after_cuda)
    slot = make_slot(d_sae, 200, activation, l0=l0, max_clamps=64)
    readable(slot, 6)
    step, x = read(slot, 3, [3, 4])
    assert slot.reads is not None
    counts = slot.reads.out[:3, 0]
    assert (counts != NOT_READ).any()
    assert (counts[counts != NOT_READ] > capacity).all()
    check(slot, step, x)


def test_lists_of_any_length_give_their_largest() -> None:
    for l0 in (90, 400, 1500):
        slot = make_slot(2048, 64, Activation.JUMPRELU, l0=l0, max_clamps=64)
        readable(slot, 5)
        check(slot, *read(slot, 2, [1, 4]))


@pytest.mark.parametrize("l0", [90, 400, 1500])
@pytest.mark.parametrize("activation", [Activation.JUMPRELU, Activation.TOPK])
def test_an_engine_may_read_up_to_512_values_of_a_token(
    activation: Activation, l0: int
) -> None:
    d_sae = 2048
    if INTERPRETED:
        d_sae, l0 = 700, {90: 90, 400: 300, 1500: 600}[l0]
    slot = make_slot(d_sae, 64, activation, k=l0, l0=l0, max_clamps=8)
    features = list(range(0, d_sae, 3))[:200]
    rows = {1: (512, []), 2: (0, list(range(512))), 3: (250, features)}
    reads = readable(slot, 5, rows, max_read=512)
    assert reads.packed.shape[1] == TABLE_HEAD + 512
    check(slot, *read(slot, 3, [1, 2, 3]), rows)


def test_equal_activations_are_listed_by_feature() -> None:
    slot = make_slot(128, 64, Activation.RELU, max_clamps=64)
    slot.weights.W_enc.zero_()
    slot.weights.b_enc.fill_(1.5)
    reads = readable(slot, 4)
    reads.scale.fill_(2.0)
    read(slot, 1, [1])
    assert reads.out[0, 2:18].tolist() == list(range(16))
    values = reads.out.view(torch.float32)[0, 18:34]
    assert (values == 3.0).all()


def test_a_step_in_which_nobody_reads_writes_nothing() -> None:
    slot = make_slot(128, 64, max_clamps=64)
    reads = readable(slot, 8)
    workspace = kernel.SteeringWorkspace(8, [slot], DEVICE)
    step = StepState(8, DEVICE)
    hidden, residual = make_stream(8, 64, DTYPE)
    kernel.launch(slot, step, workspace, hidden, residual)
    assert (reads.out == NOT_READ).all()
    assert slot.weights.meta[MetaField.D_SAE] == 128
    assert TABLE_HEAD == 4


@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
def test_a_captured_step_reads_whoever_reads_when_it_is_replayed() -> None:
    slot = make_slot(4096, 256, Activation.JUMPRELU, l0=60, max_clamps=64)
    reads = readable(slot, 64)
    step = StepState(64, DEVICE)
    workspace = kernel.SteeringWorkspace(64, [slot], DEVICE)
    hidden, residual = make_stream(64, 256, DTYPE)
    kernel.warm_up([slot], step, workspace, DTYPE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel.read_features(slot, step, workspace, hidden, residual)
    graph.replay()
    assert (reads.out == NOT_READ).all()
    x = stream(hidden, residual)
    step.read_index[:64] = torch.tensor([1, 0, 2, 4] * 16, device=DEVICE)
    step.index[Tier.FULL] = step.read_index
    settle(slot, step, Tier.FULL, x)
    step.read_index.copy_(step.index[Tier.FULL])
    graph.replay()
    torch.cuda.synchronize()
    check(slot, step, x)


@pytest.mark.parametrize("tokens", [3, 40, 300, 600])
@pytest.mark.parametrize("activation", KINDS)
@pytest.mark.parametrize("l0", [40, 640])
def test_reading_beside_full_reconstruction_changes_no_bit_of_either(
    activation: Activation, tokens: int, l0: int
) -> None:
    if INTERPRETED and (tokens > 3 or l0 > 40):
        pytest.skip("too slow when interpreted")
    # Five of seven tokens are read, four edited, two of them both.
    slot = make_slot(900, 64, activation, k=l0, l0=l0, max_clamps=64)
    reads = readable(slot, tokens + 3)
    edit = torch.tensor([5, 5, 0, 0, 0, 5, 5] * (tokens // 7 + 1), dtype=torch.int32)
    for row, clamps in ((5, []), (6, [(3, ClampKind.ABSOLUTE, 2.0, False)])):
        set_row(slot.full, row, clamps)
    edit[: tokens // 2] += (edit[: tokens // 2] == 5).int()
    step = StepState(tokens + 3, DEVICE)
    step.reading = True
    step.index[Tier.FULL, :tokens] = edit[:tokens].to(DEVICE)
    read_rows = torch.tensor([1, 2, 3, 4, 1, 0, 0] * (tokens // 7 + 1))
    hidden, residual = make_stream(tokens, 64, DTYPE)
    assert residual is not None
    workspace = kernel.SteeringWorkspace(tokens + 3, [slot], DEVICE)

    def run(reading: bool, editing: bool) -> tuple[torch.Tensor, torch.Tensor]:
        reads.out.fill_(NOT_READ)
        step.read_index[:tokens] = (read_rows[:tokens] * reading).int().to(DEVICE)
        h, r = hidden.clone(), residual.clone()
        rows = step.index.clone()
        step.index *= editing
        kernel.read_and_reconstruct(slot, step, workspace, h, r)
        step.index.copy_(rows)
        return r, reads.out.clone()

    edited, unread = run(False, True)
    unedited, found = run(True, False)
    both = run(True, True)
    assert (unread == NOT_READ).all() and torch.equal(unedited, residual)
    assert not torch.equal(edited, residual)
    assert (found[:, 0] != NOT_READ).sum() == (read_rows[:tokens] != 0).sum()
    assert torch.equal(both[0], edited)
    assert torch.equal(both[1], found)
