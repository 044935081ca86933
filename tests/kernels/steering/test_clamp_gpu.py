# SPDX-License-Identifier: Apache-2.0
"""Clamps that read only their own features' rows: every kind, count and row width.

`TRITON_INTERPRET=1` runs the small ones on a CPU that has Triton.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")

from steering_reference import (
    DEVICE,
    DTYPE,
    INTERPRETED,
    Clamp,
    check,
    expected,
    fill_slot,
    make_slot,
    make_step,
    make_stream,
    needs_gpu,
    random_clamps,
    set_row,
    settle,
    stream,
)

from vllm.config.steering import Activation, Tier
from vllm.model_executor.layers import (
    sae_full_reconstruction_kernel as kernel,
)
from vllm.model_executor.layers.steering_kernels.extension import (
    Kernels,
    cuda_ops,
    kernels_for,
)
from vllm.model_executor.layers.steering_state import (
    ClampKind,
    SAESlot,
    StepState,
    VectorSlot,
)

pytestmark = [pytest.mark.gpu, needs_gpu]
compiled_only = pytest.mark.skipif(INTERPRETED, reason="too slow when interpreted")
COUNTS = [0, 9] if INTERPRETED else [0, 1, 7, 8, 9, 20, 64]
Streams = tuple[torch.Tensor, torch.Tensor | None]


@pytest.fixture(autouse=True, params=["cuda", "triton"])
def path(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[bool]]:
    """Every test runs with the extension, where it is built, and with Triton alone.

    The list says of every launch whether the extension took it.
    """
    taken: list[bool] = []
    takes = kernel.stages_cuda.takes_clamp

    def watch(*args: object) -> bool:
        taken.append(takes(*args))  # type: ignore[arg-type]
        return taken[-1]

    monkeypatch.setattr(kernel.stages_cuda, "takes_clamp", watch)
    if request.param == "triton":
        monkeypatch.setattr(kernel, "extension_is_built", lambda: False)
    elif not kernel.extension_is_built():
        pytest.skip("the CUDA extension is not built")
    elif Kernels.CLAMPS not in kernels_for(DEVICE):
        pytest.skip("the extension has no clamp kernel for this device")
    yield taken


def skip_unless_compiled(dtype: torch.dtype) -> None:
    if INTERPRETED and dtype is torch.bfloat16:
        pytest.skip("the interpreter rounds bfloat16 differently")


def copy(x: torch.Tensor) -> torch.Tensor:
    """A copy with the strides and the alignment of `x`, unlike a clone."""
    if x.is_contiguous():
        return x.clone()
    offset = x.storage_offset()
    size = offset + (x.shape[0] - 1) * x.stride(0) + x.shape[1]
    whole = x.as_strided((size,), (1,), 0).clone()
    return whole.as_strided(x.shape, x.stride(), offset)


def copies(before: Streams) -> Streams:
    return copy(before[0]), None if before[1] is None else copy(before[1])


def apply(slot: SAESlot | VectorSlot, step: StepState, streams: Streams) -> None:
    """The additive or the delta tier, in place."""
    if isinstance(slot, VectorSlot):
        kernel.steering_vectors(slot, step, *streams)
    else:
        workspace = kernel.SteeringWorkspace(step.max_tokens, [slot], DEVICE)
        kernel.sae_clamp(slot, step, workspace, *streams)


def run_and_check(
    slot: SAESlot | VectorSlot, step: StepState, before: Streams
) -> Streams:
    """Apply to a copy of `before`, compare, return what was written."""
    tier = Tier.ADDITIVE if isinstance(slot, VectorSlot) else Tier.DELTA
    if isinstance(slot, SAESlot):
        settle(slot, step, tier, stream(*before))
    after = copies(before)
    apply(slot, step, after)
    check(expected(slot, tier, step, *before), before, after)
    return after


def half_active(d_model: int, dtype: torch.dtype = DTYPE, **options: object) -> SAESlot:
    """An SAE of 128 features, about half of which fire for a token."""
    options = {"rows": 5, "max_clamps": 64, **options}
    return make_slot(128, d_model, l0=60, dtype=dtype, **options)  # type: ignore[arg-type]


def vectors(d_model: int, max_clamps: int = 64) -> VectorSlot:
    slot = VectorSlot(80, d_model, 5, max_clamps, DEVICE)
    slot.directions.copy_(torch.randn(80, d_model) / d_model**0.5)
    return slot


def additive_clamps(count: int) -> list[Clamp]:
    return [(79 - i, ClampKind.ADDITIVE, 1.0 - 0.3 * i, False) for i in range(count)]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("two_streams", [True, False])
def test_every_count_of_clamps_equals_the_reference(
    count: int, dtype: torch.dtype, two_streams: bool, path: list[bool]
) -> None:
    skip_unless_compiled(dtype)
    slot = half_active(96, dtype)
    set_row(slot.delta, 1, random_clamps(128, count))
    set_row(slot.delta, 2, random_clamps(128, 3))
    step = make_step(9, 12, [1, 0, 2, 3], Tier.DELTA)
    run_and_check(slot, step, make_stream(9, 96, dtype, two_streams))
    assert all(path)  # the extension handled what it was given


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("two_streams", [True, False])
def test_every_count_of_vectors_equals_the_reference(
    count: int, dtype: torch.dtype, two_streams: bool, path: list[bool]
) -> None:
    skip_unless_compiled(dtype)
    slot = vectors(96)
    set_row(slot.table, 1, additive_clamps(count))
    set_row(slot.table, 2, additive_clamps(3))
    step = make_step(9, 12, [1, 0, 2, 3], Tier.ADDITIVE)
    step.flags.fill_(-1)  # skip flags do not concern vectors
    run_and_check(slot, step, make_stream(9, 96, dtype, two_streams))
    assert all(path)


@pytest.mark.parametrize(
    "kind", [ClampKind.ABSOLUTE, ClampKind.ADDITIVE, ClampKind.SCALE]
)
@pytest.mark.parametrize("only_if_active", [True, False])
def test_every_kind_of_clamp_meets_active_and_silent_features(
    kind: ClampKind, only_if_active: bool
) -> None:
    slot = half_active(64)
    clamps = [(3 * i, kind, 0.5 + i, only_if_active) for i in range(13)]
    set_row(slot.delta, 1, clamps)
    run_and_check(slot, make_step(16, 16, [1], Tier.DELTA), make_stream(16, 64, DTYPE))


@pytest.mark.parametrize("d_model", [16, 40, 264])
def test_narrow_rows_equal_the_reference(d_model: int) -> None:
    sae, additive = half_active(d_model), vectors(d_model)
    set_row(sae.delta, 1, random_clamps(128, 11))
    set_row(additive.table, 1, additive_clamps(11))
    before = make_stream(5, d_model, DTYPE)
    run_and_check(sae, make_step(5, 5, [1, 0], Tier.DELTA), before)
    run_and_check(additive, make_step(5, 5, [1, 0], Tier.ADDITIVE), before)


@compiled_only
@pytest.mark.parametrize("d_model", [2304, 3584, 4096, 5376, 7168, 16384])
@pytest.mark.parametrize("count", [1, 8, 20])
@pytest.mark.parametrize("two_streams", [True, False])
def test_wide_rows_equal_the_reference(
    d_model: int, count: int, two_streams: bool, path: list[bool]
) -> None:
    sae, additive = half_active(d_model), vectors(d_model)
    set_row(sae.delta, 1, random_clamps(128, count))
    set_row(additive.table, 1, additive_clamps(count))
    before = make_stream(300, d_model, DTYPE, two_streams)
    run_and_check(sae, make_step(300, 300, [1, 1, 0], Tier.DELTA), before)
    run_and_check(additive, make_step(300, 300, [1, 1, 0], Tier.ADDITIVE), before)
    assert all(path)


@pytest.mark.parametrize("max_clamps", [1, 3, 200])
def test_any_capacity_of_rows_is_addressed_right(max_clamps: int) -> None:
    slot = half_active(48, max_clamps=max_clamps)
    set_row(slot.delta, 1, random_clamps(128, min(max_clamps, 100)))
    set_row(slot.delta, 3, random_clamps(128, 1))
    step = make_step(6, 6, [3, 1, 4], Tier.DELTA)
    run_and_check(slot, step, make_stream(6, 48, DTYPE))


@pytest.mark.parametrize("max_clamps", [8, 64])
def test_a_batch_without_steered_tokens_is_untouched(max_clamps: int) -> None:
    slot = half_active(64, max_clamps=max_clamps)
    set_row(slot.delta, 1, random_clamps(128, 5))
    for rows in ([0], [3]):  # no row; a row of another module
        step = make_step(20, 20, rows, Tier.DELTA)
        run_and_check(slot, step, make_stream(20, 64, DTYPE))


def test_tokens_of_the_skip_set_pass_through() -> None:
    slot = half_active(64, skip_mask=0b10)
    set_row(slot.delta, 1, random_clamps(128, 9))
    step = make_step(12, 12, [1], Tier.DELTA)
    step.flags[:12] = torch.arange(12, dtype=torch.int32, device=DEVICE) % 4
    run_and_check(slot, step, make_stream(12, 64, DTYPE))


@pytest.mark.parametrize("clamps", ["mixed", "additive", "none"])
def test_tokens_past_the_norm_limit_pass_through(clamps: str) -> None:
    slot = half_active(64, norm_limit=8.0)
    chosen = {"mixed": random_clamps(128, 9), "additive": additive_clamps(9)}
    set_row(slot.delta, 1, chosen.get(clamps, []))
    step = make_step(24, 24, [1], Tier.DELTA)
    run_and_check(slot, step, make_stream(24, 64, DTYPE))


@pytest.mark.parametrize("limit", [None, 1e6])
def test_a_token_with_nan_keeps_its_bits(limit: float | None) -> None:
    slot = half_active(64, norm_limit=limit)
    set_row(slot.delta, 1, random_clamps(128, 9))
    step = make_step(4, 4, [1], Tier.DELTA)
    before = make_stream(4, 64, DTYPE)
    settle(slot, step, Tier.DELTA, stream(*before))
    before[0][2, 5] = float("nan")
    after = copies(before)
    apply(slot, step, after)
    for old, new in zip(before, after, strict=True):
        assert old is not None and new is not None
        assert torch.equal(old[2].view(torch.int16), new[2].view(torch.int16))
    assert not after[0][[0, 1, 3]].any()


def test_a_slot_for_both_activations_follows_its_meta() -> None:
    both = frozenset({Activation.JUMPRELU, Activation.TOPK})
    slot = half_active(64, activations=both)
    set_row(slot.delta, 1, random_clamps(128, 9))
    step = make_step(7, 7, [1, 0], Tier.DELTA)
    for activation in (Activation.JUMPRELU, Activation.TOPK, Activation.RELU):
        fill_slot(slot, 128, activation, k=40, l0=60)
        run_and_check(slot, step, make_stream(7, 64, DTYPE))


def test_rows_of_a_wider_tensor_are_edited_in_place(path: list[bool]) -> None:
    slot = half_active(64)
    set_row(slot.delta, 1, random_clamps(128, 9))
    step = make_step(6, 6, [1, 0], Tier.DELTA)
    wide = make_stream(6, 3 * 64, DTYPE)
    assert wide[1] is not None
    before = (wide[0][:, 64:128], wide[1][:, :64])
    settle(slot, step, Tier.DELTA, stream(*before))
    now = copies(wide)
    assert now[1] is not None
    after = (now[0][:, 64:128], now[1][:, :64])
    apply(slot, step, after)
    check(expected(slot, Tier.DELTA, step, *before), before, after)
    assert torch.equal(now[0][:, :64], wide[0][:, :64])
    assert torch.equal(now[0][:, 128:], wide[0][:, 128:])
    assert torch.equal(now[1][:, 64:], wide[1][:, 64:])
    assert all(path)


def test_rows_that_are_not_16_byte_aligned_go_to_triton(path: list[bool]) -> None:
    slot = half_active(64)
    set_row(slot.delta, 1, random_clamps(128, 9))
    step = make_step(6, 6, [1, 0], Tier.DELTA)
    before = make_stream(6, 65, DTYPE, two_streams=False)[0][:, 1:]
    run_and_check(slot, step, (before, None))
    assert not any(path)


@compiled_only
def test_a_token_depends_neither_on_its_batch_nor_on_the_run() -> None:
    sae, additive = half_active(3584), vectors(3584)
    set_row(sae.delta, 1, random_clamps(128, 20))
    set_row(sae.delta, 2, random_clamps(128, 8))
    set_row(additive.table, 1, additive_clamps(9))
    set_row(additive.table, 2, additive_clamps(1))
    before = make_stream(600, 3584, DTYPE)
    for slot, tier in ((sae, Tier.DELTA), (additive, Tier.ADDITIVE)):
        step = make_step(600, 600, [1, 2], tier)
        whole = run_and_check(slot, step, before)[1]
        seen = []
        for tokens in (1, 2, 33, 256, 600, 600, 600):
            now = copies(before)
            assert now[1] is not None
            apply(slot, step, (now[0][:tokens], now[1][:tokens]))
            seen.append(now[1][:2])
        assert all(torch.equal(seen[0][0], r[0]) for r in seen)
        assert all(torch.equal(seen[1], r) for r in seen[1:])
        assert whole is not None
        assert torch.equal(now[1], whole)


@compiled_only
@pytest.mark.parametrize("tier", [Tier.DELTA, Tier.ADDITIVE])
def test_a_captured_graph_follows_rows_and_weights(tier: Tier) -> None:
    slot = half_active(256) if tier is Tier.DELTA else vectors(256)
    table = slot.table if isinstance(slot, VectorSlot) else slot.delta
    tokens = 48
    step = make_step(tokens, 64, [1, 0, 2], tier)
    hidden, residual = make_stream(tokens, 256, DTYPE)
    assert residual is not None
    set_row(table, 1, additive_clamps(2))
    apply(slot, step, copies((hidden, residual)))  # compiles and loads
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        apply(slot, step, (hidden, residual))

    def replay() -> None:
        before = make_stream(tokens, 256, DTYPE)
        assert before[1] is not None
        hidden.copy_(before[0])
        residual.copy_(before[1])
        if isinstance(slot, SAESlot):
            settle(slot, step, tier, stream(*before))
        graph.replay()
        torch.cuda.synchronize()
        check(expected(slot, tier, step, *before), before, (hidden, residual))

    def clamps(count: int) -> list[Clamp]:
        additive = tier is Tier.ADDITIVE
        return additive_clamps(count) if additive else random_clamps(128, count)

    replay()
    set_row(table, 2, clamps(20))
    replay()
    step.index[tier, :tokens] = 0
    replay()
    step.index[tier, :tokens] = 2
    set_row(table, 2, clamps(64))
    replay()
    set_row(table, 2, clamps(3))
    if isinstance(slot, SAESlot):
        fill_slot(slot, 128, Activation.JUMPRELU, l0=60, skip_mask=1, norm_limit=16.5)
        step.flags[::3] = 1
    else:
        slot.directions.mul_(-2)
    replay()


def test_the_build_finds_its_code_for_the_device(path: list[bool]) -> None:
    if not kernel.extension_is_built():
        pytest.skip("with the extension alone")
    assert cuda_ops().has_clamps(torch.empty(0, device=DEVICE)) == 1
