# SPDX-License-Identifier: Apache-2.0
"""Full reconstruction and delta clamps on the GPU, against float64.

`TRITON_INTERPRET=1` runs the same tests on a CPU that has Triton (small ones only).
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from steering_reference import (
    DEVICE,
    DTYPE,
    INTERPRETED,
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
from vllm.model_executor.layers.steering_state import (
    ClampKind,
    SAESlot,
    StepState,
)

pytestmark = [
    pytest.mark.gpu,
    needs_gpu,
    pytest.mark.usefixtures("implementation"),
]
compiled_only = pytest.mark.skipif(INTERPRETED, reason="too slow when interpreted")

APPLY = {Tier.FULL: kernel.full_reconstruction, Tier.DELTA: kernel.sae_clamp}
SHAPES = [(97, 50)] if INTERPRETED else [(97, 50), (130, 33), (64, 16)]
KINDS = [Activation.RELU, Activation.JUMPRELU, Activation.TOPK]


def poison(workspace: kernel.SteeringWorkspace) -> None:
    """Fill the scratch memory with NaN patterns, so that stale reads show."""
    for arena in (workspace._x, workspace._shared, workspace._coef):
        arena.fill_(0xFF)
    for counter in (
        workspace.tokens,
        workspace.records,
        workspace.kth,
        workspace.count,
    ):
        counter.fill_(-7)


def run_and_check(
    slot: SAESlot,
    step: StepState,
    tokens: int,
    tier: Tier = Tier.FULL,
    two_streams: bool = True,
    workspace: kernel.SteeringWorkspace | None = None,
) -> torch.Tensor:
    """Apply a tier to a fresh random stream, compare, return what it wrote."""
    dtype = slot.weights.W_enc.dtype
    before = make_stream(tokens, slot.weights.d_in, dtype, two_streams)
    settle(slot, step, tier, stream(*before))
    hidden = before[0].clone()
    residual = None if before[1] is None else before[1].clone()
    ws = workspace or kernel.SteeringWorkspace(step.max_tokens, [slot], DEVICE)
    poison(ws)
    APPLY[tier](slot, step, ws, hidden, residual)
    check(expected(slot, tier, step, *before), before, (hidden, residual))
    return hidden if residual is None else residual


def with_rows(slot: SAESlot, tier: Tier = Tier.FULL, clamps: int = 4) -> list[int]:
    """Rows 1 (no clamps) and 2 (random clamps) for the tier; returns a mixed batch."""
    table = slot.full if tier is Tier.FULL else slot.delta
    d_sae = int(slot.weights.meta[0])
    set_row(table, 1, [] if tier is Tier.FULL else random_clamps(d_sae, 1))
    set_row(table, 2, random_clamps(d_sae, clamps))
    return [1, 0, 2, 2, 0, 1, 3]  # row 3 is empty: not this module's


@pytest.mark.parametrize("tier", [Tier.FULL, Tier.DELTA])
@pytest.mark.parametrize("activation", KINDS)
@pytest.mark.parametrize("tokens", [19] if INTERPRETED else [1, 7, 33])
@pytest.mark.parametrize("two_streams", [True, False])
def test_a_mixed_batch_equals_the_float64_reference(
    tier: Tier, activation: Activation, tokens: int, two_streams: bool
) -> None:
    slot = make_slot(200, 64, activation)
    step = make_step(tokens, 40, with_rows(slot, tier), tier)
    run_and_check(slot, step, tokens, tier, two_streams)


@pytest.mark.parametrize("activation", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_odd_sizes_and_every_dtype_equal_the_reference(
    activation: Activation, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    if INTERPRETED and dtype is torch.bfloat16:
        pytest.skip("the interpreter has no bfloat16 products")
    slot = make_slot(*shape, activation, dtype=dtype)
    step = make_step(19, 19, with_rows(slot), Tier.FULL)
    run_and_check(slot, step, 19)


@compiled_only
@pytest.mark.parametrize("tier", [Tier.FULL, Tier.DELTA])
@pytest.mark.parametrize("activation", [Activation.JUMPRELU, Activation.TOPK])
@pytest.mark.parametrize("tokens", [16, 17, 64, 65, 128, 129, 256, 300, 1500])
def test_every_launch_size_equals_the_reference(
    tier: Tier, activation: Activation, tokens: int
) -> None:
    slot = make_slot(4096, 768, activation, k=32, l0=60)
    step = make_step(tokens, 2048, with_rows(slot, tier), tier)
    run_and_check(slot, step, tokens, tier)


@compiled_only
@pytest.mark.parametrize("tokens", [3, 200])
def test_the_target_shape_equals_the_reference(tokens: int) -> None:
    slot = make_slot(16384, 2304, l0=100)
    step = make_step(tokens, 256, with_rows(slot), Tier.FULL)
    run_and_check(slot, step, tokens)


def test_no_tokens_is_no_work() -> None:
    slot = make_slot(64, 32)
    step = make_step(0, 8, [1], Tier.FULL)
    run_and_check(slot, step, 0)


@pytest.mark.parametrize("tier", [Tier.FULL, Tier.DELTA])
@pytest.mark.parametrize("activation", [Activation.JUMPRELU, Activation.TOPK])
def test_a_batch_without_steered_tokens_is_untouched(
    tier: Tier, activation: Activation
) -> None:
    slot = make_slot(64, 32, activation)
    with_rows(slot, tier)
    run_and_check(slot, make_step(20, 20, [0], tier), 20, tier)


@pytest.mark.parametrize("activation", [Activation.JUMPRELU, Activation.TOPK])
def test_a_batch_of_steered_tokens_only_is_rebuilt(activation: Activation) -> None:
    slot = make_slot(64, 32, activation)
    with_rows(slot)
    run_and_check(slot, make_step(20, 20, [2], Tier.FULL), 20)


@pytest.mark.parametrize("activation", KINDS)
@pytest.mark.parametrize("tier", [Tier.FULL, Tier.DELTA])
def test_features_past_d_sae_of_a_wider_slot_never_fire(
    activation: Activation, tier: Tier
) -> None:
    slot = make_slot(100, 48, activation, capacity=160)
    run_and_check(slot, make_step(9, 9, with_rows(slot, tier), tier), 9, tier)


@pytest.mark.parametrize("tier", [Tier.FULL, Tier.DELTA])
@pytest.mark.parametrize("activation", [Activation.JUMPRELU, Activation.TOPK])
def test_tokens_of_the_skip_set_pass_through(
    tier: Tier, activation: Activation
) -> None:
    slot = make_slot(64, 32, activation, skip_mask=0b10)
    with_rows(slot, tier)
    step = make_step(12, 12, [2], tier)
    step.flags[:12] = torch.arange(12, dtype=torch.int32, device=DEVICE) % 4
    run_and_check(slot, step, 12, tier)


@pytest.mark.parametrize("tier", [Tier.FULL, Tier.DELTA])
@pytest.mark.parametrize("activation", [Activation.JUMPRELU, Activation.TOPK])
def test_tokens_past_the_norm_limit_pass_through(
    tier: Tier, activation: Activation
) -> None:
    slot = make_slot(64, 32, activation, norm_limit=32**0.5)
    with_rows(slot, tier)
    run_and_check(slot, make_step(24, 24, [2], tier), 24, tier)


@pytest.mark.parametrize("l0", [150] if INTERPRETED else [150, 300])
def test_hundreds_of_non_zeros_are_summed(l0: int) -> None:
    slot = make_slot(600, 32, l0=l0)
    run_and_check(slot, make_step(5, 5, with_rows(slot), Tier.FULL), 5)


@compiled_only
@pytest.mark.parametrize("tokens", [120, 133, 200, 256])
@pytest.mark.parametrize("activation", [Activation.JUMPRELU, Activation.TOPK])
def test_steps_with_more_tokens_than_multiprocessors(
    activation: Activation, tokens: int
) -> None:
    slot = make_slot(3000, 520, activation, l0=40, k=40)
    step = make_step(tokens, tokens, [1, 2], Tier.FULL)
    with_rows(slot)
    run_and_check(slot, step, tokens)


@compiled_only
@pytest.mark.parametrize("tokens", [129, 136, 256])
def test_a_wide_site_whose_blocks_encode_in_pairs(tokens: int) -> None:
    slot = make_slot(66000, 328, l0=40)
    with_rows(slot)
    workspace = kernel.SteeringWorkspace(256, [slot], DEVICE)
    for active in (tokens, tokens - 60, 3):
        step = make_step(tokens, 256, [2], Tier.FULL)
        step.index[Tier.FULL, active:] = 0
        run_and_check(slot, step, tokens, workspace=workspace)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("k", [5] if INTERPRETED else [1, 5, 40, 64])
def test_topk_keeps_exactly_k_with_or_without_clipping(relu: bool, k: int) -> None:
    slot = make_slot(64, 32, Activation.TOPK, k=k, topk_relu=relu)
    run_and_check(slot, make_step(6, 6, with_rows(slot), Tier.FULL), 6)


@pytest.mark.parametrize("equal", [64, 3000])
@pytest.mark.parametrize("tier", [Tier.FULL, Tier.DELTA])
def test_topk_ties_go_to_the_lowest_feature(equal: int, tier: Tier) -> None:
    slot = make_slot(equal, 32, Activation.TOPK, k=7)
    slot.weights.W_enc.zero_()
    slot.weights.b_enc.fill_(0.5)
    table = slot.full if tier is Tier.FULL else slot.delta
    clamps = [(6, ClampKind.SCALE, 3.0, False), (7, ClampKind.SCALE, 3.0, False)]
    set_row(table, 1, clamps)
    run_and_check(slot, make_step(3, 3, [1], tier), 3, tier)


@pytest.mark.parametrize("k", [1500] if INTERPRETED else [200, 1500, 3000])
def test_a_large_k_is_selected_exactly(k: int) -> None:
    features, tokens = (2100, 2) if INTERPRETED else (5000, 9)
    slot = make_slot(features, 64, Activation.TOPK, k=k, topk_relu=False)
    step = make_step(tokens, tokens, with_rows(slot), Tier.FULL)
    run_and_check(slot, step, tokens)


def test_a_slot_for_both_activations_follows_its_meta() -> None:
    both = frozenset({Activation.JUMPRELU, Activation.TOPK})
    slot = make_slot(80, 32, Activation.JUMPRELU, activations=both)
    workspace = kernel.SteeringWorkspace(9, [slot], DEVICE)
    for activation in (Activation.JUMPRELU, Activation.TOPK):
        fill_slot(slot, 80, activation)
        for tier in (Tier.FULL, Tier.DELTA):
            step = make_step(9, 9, with_rows(slot, tier), tier)
            run_and_check(slot, step, 9, tier, workspace=workspace)


def test_long_steps_pass_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.steering_kernels import plan

    monkeypatch.setattr(plan, "MAX_GATHER_BYTES", 8 * 32 * 2)
    for activation in (Activation.JUMPRELU, Activation.TOPK):
        slot = make_slot(64, 32, activation)
        run_and_check(slot, make_step(29, 29, with_rows(slot), Tier.FULL), 29)


@pytest.mark.parametrize("activation", [Activation.JUMPRELU, Activation.TOPK])
def test_chunks_without_tokens_change_nothing(
    activation: Activation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks have eight tokens: the last that has any is full, or not, or the first."""
    from vllm.model_executor.layers.steering_kernels import plan

    monkeypatch.setattr(plan, "MAX_GATHER_BYTES", 8 * 32 * 2)
    slot = make_slot(64, 32, activation)
    for active in (0, 5, 8, 11, 16):
        step = make_step(29, 29, with_rows(slot), Tier.FULL)
        rows = step.index[Tier.FULL, :29]
        rows[(rows != 0).cumsum(0) > active] = 0
        run_and_check(slot, step, 29)


def test_the_result_does_not_depend_on_the_run() -> None:
    slot = make_slot(512, 64, l0=90)
    with_rows(slot)
    step = make_step(13, 13, [2], Tier.FULL)
    workspace = kernel.SteeringWorkspace(13, [slot], DEVICE)
    hidden, residual = make_stream(13, 64, DTYPE)
    results = []
    for _ in range(2 if INTERPRETED else 20):
        assert residual is not None
        h, r = hidden.clone(), residual.clone()
        kernel.full_reconstruction(slot, step, workspace, h, r)
        results.append(r)
    assert all(torch.equal(results[0], r) for r in results)


@compiled_only
@pytest.mark.parametrize("activation", [Activation.JUMPRELU, Activation.TOPK])
@pytest.mark.parametrize("d_sae", [4096, 65536])
def test_a_token_does_not_depend_on_its_batch(
    activation: Activation, d_sae: int
) -> None:
    slot = make_slot(d_sae, 512, activation, l0=60, k=32)
    with_rows(slot)
    lengths = (1300, 1, 5, 33, 100, 136, 256, 300, 384, 420, 500, 700, 1100)
    most = max(lengths)
    hidden, residual = make_stream(most, 512, DTYPE)
    step = make_step(most, most, [2], Tier.FULL)
    workspace = kernel.SteeringWorkspace(most, [slot], DEVICE)
    assert residual is not None
    seen = []
    for tokens in lengths:
        h, r = hidden[:tokens].clone(), residual[:tokens].clone()
        kernel.full_reconstruction(slot, step, workspace, h, r)
        seen.append(r)
    assert all(torch.equal(seen[0][: len(r)], r) for r in seen)


@compiled_only
@pytest.mark.parametrize("tier", [Tier.FULL, Tier.DELTA])
@pytest.mark.parametrize("activation", [Activation.JUMPRELU, Activation.TOPK])
def test_a_captured_graph_follows_rows_clamps_and_weights(
    tier: Tier, activation: Activation
) -> None:
    slot = make_slot(1000, 256, activation, k=16, l0=30)
    rows = with_rows(slot, tier)
    tokens = 48
    step = make_step(tokens, 64, rows, tier)
    workspace = kernel.SteeringWorkspace(64, [slot], DEVICE)
    hidden, residual = make_stream(tokens, 256, DTYPE)
    assert residual is not None
    kernel.warm_up([slot], [], StepState(64, DEVICE), workspace, DTYPE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        APPLY[tier](slot, step, workspace, hidden, residual)

    def replay() -> None:
        before = make_stream(tokens, 256, DTYPE)
        assert before[1] is not None
        hidden.copy_(before[0])
        residual.copy_(before[1])
        settle(slot, step, tier, stream(*before))
        poison(workspace)
        graph.replay()
        torch.cuda.synchronize()
        check(expected(slot, tier, step, *before), before, (hidden, residual))

    replay()
    step.index[tier, :tokens] = 0
    replay()
    step.index[tier, :tokens] = 2
    replay()
    set_row(slot.full if tier is Tier.FULL else slot.delta, 2, random_clamps(900, 8))
    replay()
    fill_slot(slot, 900, activation, k=9, l0=50, skip_mask=1, norm_limit=16.5)
    step.flags[::3] = 1
    replay()


def test_the_workspace_keeps_its_limit_and_holds_every_step() -> None:
    if INTERPRETED:
        pytest.skip("allocates hundreds of MiB")
    from vllm.model_executor.layers.steering_kernels.plan import LIST_MAX
    from vllm.model_executor.layers.steering_state import SAEWeights

    for d_sae, d_model in ((16384, 2304), (131072, 5376)):
        weights = SAEWeights(d_sae, d_model, torch.bfloat16, DEVICE)
        kinds = frozenset({Activation.JUMPRELU, Activation.TOPK})
        slot = SAESlot(weights, 9, 64, kinds)
        for max_tokens in (1, 256, 8192, 65536):
            workspace = kernel.SteeringWorkspace(max_tokens, [slot], DEVICE)
            assert workspace.nbytes <= 256 << 20
            for topk in (False, True):
                for tokens in {1, max_tokens // 3 + 1, max_tokens}:
                    views = workspace.buffers(slot, tokens, topk)
                    assert stream(views.x, None).shape[0] * views.plan.num_chunks >= 1
                    assert views.plan.capacity >= LIST_MAX
                    assert views.plan.dense_rows >= 1


def test_a_stream_of_the_wrong_width_is_refused() -> None:
    slot = make_slot(64, 32)
    step = make_step(4, 4, [1], Tier.FULL)
    workspace = kernel.SteeringWorkspace(4, [slot], DEVICE)
    hidden = torch.zeros(4, 33, device=DEVICE, dtype=DTYPE)
    with pytest.raises(ValueError, match=r"hidden has shape \(4, 33\)"):
        kernel.full_reconstruction(slot, step, workspace, hidden, None)
