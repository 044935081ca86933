# SPDX-License-Identifier: Apache-2.0
"""The three custom ops: their contract with torch, and which tokens they edit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from steering_testing.reference import Clamp, full
from steering_testing.sites import (
    CPU,
    MAX_CLAMPS,
    ROWS,
    Bench,
    bench,
    exact_sae,
    load_slot,
    set_row,
    steer_every_tier,
)

from vllm.config.steering import Tier
from vllm.model_executor.layers import sae_full_reconstruction, sae_steering  # noqa: F401
from vllm.model_executor.layers.steering import apply_layer_steering
from vllm.model_executor.layers.steering_families import FAMILIES  # noqa: F401
from vllm.model_executor.layers.steering_state import VectorSlot

FULL_OP = "apply_sae_full_reconstruction"
DELTA_OP = "apply_sae_clamp"
VECTOR_OP = "apply_steering_vectors"
OPS = {Tier.ADDITIVE: VECTOR_OP, Tier.DELTA: DELTA_OP, Tier.FULL: FULL_OP}
D, F, T = 8, 20, 7
INDEX = [0, 1, 2, 0, 1, 0, 2]


def every_tier(
    seed: int = 0, single_stream: bool = False, tiers: tuple[Tier, ...] = tuple(Tier)
) -> Bench:
    """A site where rows 1 and 2 of every tier do something."""
    rng = np.random.default_rng(seed)
    sae = exact_sae(rng, F, D, "jumprelu")
    slot = load_slot(sae)
    vectors = steer_every_tier(slot, D)
    rows = {tier: INDEX for tier in tiers}
    return bench(rng, T, D, [slot], vectors, rows, single_stream=single_stream)


@pytest.mark.parametrize("single_stream", [False, True])
@pytest.mark.parametrize("tier", list(Tier))
def test_every_op_passes_opcheck(tier: Tier, single_stream: bool) -> None:
    case = every_tier(single_stream=single_stream)
    op = getattr(torch.ops.vllm, OPS[tier]).default
    with case.forward():
        torch.library.opcheck(op, (case.hidden, case.residual, case.site.name))


@pytest.mark.parametrize("tier", list(Tier))
def test_an_op_edits_its_tiers_tokens_and_no_others_bits(tier: Tier) -> None:
    case = every_tier()
    before = case.hidden.clone(), case.residual.clone()
    case.run(OPS[tier])
    for at, row in enumerate(INDEX):
        same = torch.equal(case.hidden[at], before[0][at]) and torch.equal(
            case.residual[at], before[1][at]
        )
        assert same == (row == 0), at


@pytest.mark.parametrize("tier", list(Tier))
def test_an_edited_token_is_written_back_exactly(tier: Tier) -> None:
    case = every_tier()
    case.run(OPS[tier])
    edited = [at for at, row in enumerate(INDEX) if row]
    assert not case.hidden[edited].any()
    assert case.residual[edited].any()


@pytest.mark.parametrize("tier", list(Tier))
def test_one_tensor_or_two_carry_the_same_stream(tier: Tier) -> None:
    pair, single = every_tier(), every_tier(single_stream=True)
    single.hidden = pair.stream.clone()
    pair.run(OPS[tier])
    single.run(OPS[tier])
    assert torch.equal(pair.stream, single.hidden)


@pytest.mark.parametrize("op", OPS.values())
def test_a_step_without_tokens_is_no_error(op: str) -> None:
    case = every_tier()
    case.hidden, case.residual = case.hidden[:0], case.residual[:0]
    case.run(op)
    assert case.hidden.shape == (0, D)


@pytest.mark.parametrize("tier", list(Tier))
def test_a_tier_without_rows_in_the_step_touches_nothing(tier: Tier) -> None:
    others = tuple(other for other in Tier if other is not tier)
    case = every_tier(tiers=others)
    before = case.hidden.clone(), case.residual.clone()
    case.run(OPS[tier])
    assert torch.equal(case.hidden, before[0])
    assert torch.equal(case.residual, before[1])


def test_a_site_runs_additive_then_delta_then_full() -> None:
    together, apart = every_tier(), every_tier()
    with together.forward():
        apply_layer_steering(together.site, together.hidden, together.residual)
    for tier in Tier:
        apart.run(OPS[tier])
    assert torch.equal(together.hidden, apart.hidden)
    assert torch.equal(together.residual, apart.residual)


def test_a_site_without_modules_of_a_tier_never_calls_its_op() -> None:
    rng = np.random.default_rng(0)
    empty = bench(rng, T, D)
    # Outside of a forward context any op would raise.
    apply_layer_steering(empty.site, empty.hidden, empty.residual)


def test_two_requests_reconstruct_with_two_saes_at_one_site() -> None:
    rng = np.random.default_rng(4)
    saes = [exact_sae(rng, F, D, "relu"), exact_sae(rng, F + 3, D, "topk")]
    slots = [load_slot(sae) for sae in saes]
    set_row(slots[0].full, 1, [])
    set_row(slots[1].full, 2, [])
    case = bench(rng, T, D, slots, rows={Tier.FULL: INDEX})
    stream = case.stream.double()
    case.run(FULL_OP)
    for at, row in enumerate(INDEX):
        expected = full(saes[row - 1], [], stream[at]) if row else stream[at]
        assert torch.equal(case.stream[at].double(), expected)


@pytest.mark.parametrize("tier", [Tier.DELTA, Tier.FULL])
def test_a_token_of_the_modules_skip_set_keeps_its_bits(tier: Tier) -> None:
    rng = np.random.default_rng(1)
    slot = load_slot(exact_sae(rng, F, D, "relu"), skip_mask=0b10)
    for table in (slot.delta, slot.full):
        set_row(table, 1, [Clamp(0, "additive", 1.0)])
    # Only bit 1 belongs to this module.
    flags = [0b00, 0b01, 0b10, 0b11]
    case = bench(rng, 4, D, [slot], rows={tier: [1] * 4}, flags=flags)
    before = case.hidden.clone(), case.residual.clone()
    case.run(OPS[tier])
    kept = [torch.equal(case.hidden[at], before[0][at]) for at in range(4)]
    assert kept == [False, False, True, True]
    assert torch.equal(case.residual[2:], before[1][2:])


@pytest.mark.parametrize("tier", [Tier.DELTA, Tier.FULL])
def test_the_norm_guard_lets_the_limit_itself_pass(tier: Tier) -> None:
    rng = np.random.default_rng(2)
    slot = load_slot(exact_sae(rng, F, D, "relu"), norm_limit=5.0)
    for table in (slot.delta, slot.full):
        set_row(table, 1, [Clamp(0, "additive", 1.0)])
    case = bench(rng, 3, D, [slot], rows={tier: [1] * 3})
    case.hidden.zero_()
    case.residual.zero_()
    # The norm of the sum counts: 5.0 exactly, a little more, and 2.5 + 2.5.
    case.hidden[0, :2] = torch.tensor([3.0, 4.0])
    case.hidden[1, :2] = torch.tensor([3.0, 4.125])
    case.hidden[2, 0] = case.residual[2, 0] = 4.0
    before = case.hidden.clone(), case.residual.clone()
    case.run(OPS[tier])
    edited = [not torch.equal(case.hidden[at], before[0][at]) for at in range(3)]
    assert edited == [True, False, False]
    assert torch.equal(case.residual[1:], before[1][1:])


@pytest.mark.parametrize("tier", [Tier.DELTA, Tier.FULL])
def test_a_bypassed_token_stays_for_the_next_tier(tier: Tier) -> None:
    """Each tier's guard reads what the tier before it wrote."""
    rng = np.random.default_rng(3)
    slot = load_slot(exact_sae(rng, F, D, "relu"), norm_limit=1.0)
    set_row(slot.delta, 1, [Clamp(0, "additive", 1.0)])
    set_row(slot.full, 1, [])
    vectors = VectorSlot(1, D, ROWS, MAX_CLAMPS, CPU)
    vectors.directions.fill_(8.0)
    set_row(vectors.table, 1, [Clamp(0, "additive", 1.0)])
    rows = {Tier.ADDITIVE: [1], tier: [1]}
    case = bench(rng, 1, D, [slot], vectors, rows)
    start = case.stream.clone()
    with case.forward():
        apply_layer_steering(case.site, case.hidden, case.residual)
    assert torch.equal(case.stream, start + 8.0)


def test_unconditional_additive_clamps_read_nothing_of_the_encoder() -> None:
    rng = np.random.default_rng(5)
    for activation in ("relu", "jumprelu", "topk"):
        sae = exact_sae(rng, F, D, activation)
        slot = load_slot(sae)
        slot.weights.W_enc.fill_(float("nan"))
        clamps = [Clamp(4, "additive", 1.5), Clamp(9, "additive", -0.5)]
        set_row(slot.delta, 1, clamps)
        case = bench(rng, T, D, [slot], rows={Tier.DELTA: [1] * T})
        expected = case.stream + 1.5 * sae.W_dec[4].float() - 0.5 * sae.W_dec[9].float()
        case.run(DELTA_OP)
        assert torch.equal(case.stream, expected)


def test_delta_with_a_threshold_reads_only_the_clamped_features_rows() -> None:
    rng = np.random.default_rng(6)
    for activation in ("relu", "jumprelu"):
        slot = load_slot(exact_sae(rng, F, D, activation))
        untouched = [i for i in range(F) if i not in (4, 9)]
        # Places past a row's count hold feature 0, whose weights may be read.
        untouched.remove(0)
        slot.weights.W_enc[untouched] = float("nan")
        slot.weights.W_dec[untouched] = float("nan")
        clamps = [Clamp(4, "absolute", 1.5), Clamp(9, "scale", 2.0, True)]
        set_row(slot.delta, 1, clamps)
        case = bench(rng, T, D, [slot], rows={Tier.DELTA: [1] * T})
        case.run(DELTA_OP)
        assert case.stream.isfinite().all()
