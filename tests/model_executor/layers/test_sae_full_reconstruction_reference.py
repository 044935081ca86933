# SPDX-License-Identifier: Apache-2.0
"""The ops equal the dense float64 mathematics, bit for bit where arithmetic is exact;
and the mathematics itself obeys its algebra."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from steering_testing.reference import Clamp, DenseSAE, clamped, delta, full, random_sae
from steering_testing.sites import (
    CPU,
    MAX_CLAMPS,
    bench,
    exact_clamps,
    exact_sae,
    load_slot,
    set_row,
)

from vllm.config.steering import Tier
from vllm.model_executor.layers import steering_reference
from vllm.model_executor.layers.steering_bypass import Bypass
from vllm.model_executor.layers.steering_families import FAMILIES  # noqa: F401
from vllm.model_executor.layers.steering_reference_backend import ReferenceBackend
from vllm.model_executor.layers.steering_state import (
    MetaField,
    SAEWeights,
    StepState,
    VectorSlot,
)

ACTIVATIONS = ("relu", "jumprelu", "topk")
OPS = {Tier.DELTA: "apply_sae_clamp", Tier.FULL: "apply_sae_full_reconstruction"}
MATHS = {Tier.DELTA: delta, Tier.FULL: full}
D, F = 8, 20

sizes = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**31),
        "d_model": st.integers(1, 12),
        "d_sae": st.integers(1, 24),
        "num_tokens": st.integers(0, 9),
        "activation": st.sampled_from(ACTIVATIONS),
        "k": st.integers(1, 24),
        "topk_relu": st.booleans(),
        "spare": st.sampled_from([0, 5]),
        "share": st.sampled_from([0.0, 0.5, 1.0]),
        "dtype": st.sampled_from([torch.float32, torch.bfloat16]),
        "single_stream": st.booleans(),
    }
)


def check_op(tier: Tier, size: dict[str, Any]) -> None:
    """One op on a random step against the float64 mathematics, bit for bit."""
    rng = np.random.default_rng(size["seed"])
    d_model, d_sae, dtype = size["d_model"], size["d_sae"], size["dtype"]
    sae = exact_sae(rng, d_sae, d_model, size["activation"], size["k"])
    sae.topk_relu = size["topk_relu"]
    slot = load_slot(sae, dtype, size["spare"])
    clamps = [exact_clamps(rng, d_sae, MAX_CLAMPS) for _ in range(3)]
    table = slot.full if tier is Tier.FULL else slot.delta
    for row, of_row in enumerate(clamps, start=1):
        set_row(table, row, of_row)
    steered = rng.random(size["num_tokens"]) < size["share"]
    rows = np.where(steered, rng.integers(1, 4, size["num_tokens"]), 0)
    case = bench(
        rng,
        size["num_tokens"],
        d_model,
        [slot],
        rows={tier: rows.tolist()},
        dtype=dtype,
        single_stream=size["single_stream"],
    )
    before = (
        case.hidden.clone(),
        None if case.residual is None else case.residual.clone(),
    )
    start = case.stream.double()
    case.run(OPS[tier])
    for at, row in enumerate(rows.tolist()):
        if not row:
            assert torch.equal(case.hidden[at], before[0][at])
            assert before[1] is None or torch.equal(case.residual[at], before[1][at])
            continue
        # The last step of the contract: one rounding to the model's dtype.
        expected = MATHS[tier](sae, clamps[row - 1], start[at]).to(dtype)
        assert torch.equal(case.stream[at], expected), (at, row)


@settings(max_examples=60)
@given(size=sizes)
def test_full_reconstruction_equals_the_dense_mathematics(size: dict[str, Any]) -> None:
    check_op(Tier.FULL, size)


@settings(max_examples=60)
@given(size=sizes)
def test_delta_equals_the_dense_mathematics(size: dict[str, Any]) -> None:
    check_op(Tier.DELTA, size)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_ordinary_numbers_agree_to_float32_accuracy(activation: str) -> None:
    sae = random_sae(300, 96, activation, 1, k=20)
    slot = load_slot(sae)
    set_row(slot.full, 1, [Clamp(7, "absolute", 2.0), Clamp(9, "scale", 3.0)])
    rng = np.random.default_rng(0)
    case = bench(rng, 32, 96, [slot], rows={Tier.FULL: [1] * 32})
    case.hidden.normal_()
    start = case.stream.double()
    case.run(OPS[Tier.FULL])
    clamps = [Clamp(7, "absolute", 2.0), Clamp(9, "scale", 3.0)]
    expected = torch.stack([full(sae, clamps, x) for x in start])
    torch.testing.assert_close(case.stream.double(), expected, rtol=1e-5, atol=1e-5)


def test_accumulation_is_float32_however_narrow_the_weights() -> None:
    """A bfloat16 running sum would stop growing at 256 ones."""
    d_model = 1024
    sae = DenseSAE(
        W_enc=torch.ones(1, d_model).double(),
        b_enc=torch.zeros(1).double(),
        W_dec=torch.ones(1, d_model).double() / d_model,
        b_dec=torch.zeros(d_model).double(),
    )
    slot = load_slot(sae, torch.bfloat16)
    set_row(slot.full, 1, [])
    rng = np.random.default_rng(0)
    case = bench(rng, 1, d_model, [slot], rows={Tier.FULL: [1]}, dtype=torch.bfloat16)
    case.hidden.fill_(1.0)
    case.residual.zero_()
    case.run(OPS[Tier.FULL])
    assert torch.equal(case.stream, torch.ones(1, d_model, dtype=torch.bfloat16))


def test_slices_of_features_and_tokens_do_not_show(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run() -> torch.Tensor:
        rng = np.random.default_rng(8)
        slot = load_slot(exact_sae(rng, F, D, "topk"))
        set_row(slot.full, 1, exact_clamps(rng, F, MAX_CLAMPS))
        case = bench(rng, 9, D, [slot], rows={Tier.FULL: [1] * 9})
        case.run(OPS[Tier.FULL])
        return case.stream

    whole = run()
    monkeypatch.setattr(steering_reference, "FEATURE_SLICE", 3)
    monkeypatch.setattr(steering_reference, "TOKEN_SLICE", 2)
    assert torch.equal(run(), whole)


def encode(sae: DenseSAE, x: torch.Tensor) -> torch.Tensor:
    return steering_reference.encode(load_slot(sae).weights, x.float())


def test_topk_ties_go_to_the_lowest_index() -> None:
    sae = exact_sae(np.random.default_rng(0), 6, 2, "topk", k=2)
    sae.W_enc.zero_()
    sae.b_enc.copy_(torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0, 3.0]))
    assert encode(sae, torch.zeros(1, 2)).tolist() == [[0, 3.0, 0, 3.0, 0, 0]]


def test_topk_keeps_what_it_selected_below_zero_only_without_relu() -> None:
    sae = exact_sae(np.random.default_rng(0), 3, 2, "topk", k=2)
    sae.W_enc.zero_()
    sae.b_enc.copy_(torch.tensor([-1.0, 2.0, -3.0]))
    assert encode(sae, torch.zeros(1, 2)).tolist() == [[0, 2.0, 0]]
    sae.topk_relu = False
    assert encode(sae, torch.zeros(1, 2)).tolist() == [[-1.0, 2.0, 0]]


def test_a_threshold_is_strict_and_never_below_zero() -> None:
    sae = exact_sae(np.random.default_rng(0), 4, 2, "jumprelu")
    sae.W_enc.zero_()
    sae.b_enc.copy_(torch.tensor([1.0, 1.0, -0.5, 0.25]))
    sae.threshold = torch.tensor([1.0, 0.5, -1.0, -1.0]).double()
    assert encode(sae, torch.zeros(1, 2)).tolist() == [[0, 1.0, 0, 0.25]]


def test_an_empty_slot_has_no_active_feature() -> None:
    weights = SAEWeights(16, D, torch.float32, CPU)
    for uses_topk in (0, 1):
        weights.meta[MetaField.USES_TOPK] = uses_topk
        acts = steering_reference.encode(weights, torch.full((3, D), 1e6))
        assert not acts.any()


def identity_sae(d_model: int) -> DenseSAE:
    """Two features for each direction: its positive and its negative part."""
    eye = torch.eye(d_model).double()
    both = torch.cat([eye, -eye])
    zeros = torch.zeros(d_model).double()
    return DenseSAE(both, torch.zeros(2 * d_model).double(), both, zeros)


def apply(
    tier: Tier, sae: DenseSAE, clamps: list[Clamp], seed: int = 0, num_tokens: int = 5
) -> tuple[torch.Tensor, torch.Tensor]:
    """The stream before and after one op, all tokens steered."""
    rng = np.random.default_rng(seed)
    slot = load_slot(sae)
    set_row(slot.full if tier is Tier.FULL else slot.delta, 1, clamps)
    d_model = sae.W_enc.shape[1]
    case = bench(rng, num_tokens, d_model, [slot], rows={tier: [1] * num_tokens})
    before = case.stream.clone()
    case.run(OPS[tier])
    return before, case.stream


def test_an_identity_sae_reconstructs_the_stream_itself() -> None:
    before, after = apply(Tier.FULL, identity_sae(D), [])
    assert torch.equal(before, after)


def some_sae(activation: str) -> DenseSAE:
    return exact_sae(np.random.default_rng(17), F, D, activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_empty_clamps_give_the_plain_reconstruction(activation: str) -> None:
    sae = some_sae(activation)
    before, after = apply(Tier.FULL, sae, [])
    plain = torch.stack(
        [sae.encode(x) @ sae.W_dec + sae.b_dec for x in before.double()]
    )
    assert torch.equal(after.double(), plain)


@pytest.mark.parametrize("tier", [Tier.DELTA, Tier.FULL])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_scale_one_and_additive_zero_change_nothing(
    activation: str, tier: Tier
) -> None:
    sae = some_sae(activation)
    clamps = [Clamp(1, "scale", 1.0), Clamp(2, "additive", 0.0)]
    _, clamped_out = apply(tier, sae, clamps)
    before, plain = apply(tier, sae, [])
    assert torch.equal(clamped_out, plain)
    assert tier is Tier.FULL or torch.equal(plain, before)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_full_is_delta_minus_the_reconstruction_error(activation: str) -> None:
    sae = some_sae(activation)
    clamps = [Clamp(1, "absolute", 2.0), Clamp(6, "scale", -1.0, True)]
    before, with_error = apply(Tier.DELTA, sae, clamps)
    _, plain = apply(Tier.FULL, sae, [])
    _, without = apply(Tier.FULL, sae, clamps)
    assert torch.equal(without, with_error - (before - plain))


def test_an_edit_is_linear_in_an_additive_value() -> None:
    sae = some_sae("relu")
    changes = []
    for value in (1.0, 2.0):
        before, after = apply(Tier.DELTA, sae, [Clamp(3, "additive", value)])
        changes.append(after - before)
    assert torch.equal(2 * changes[0], changes[1])


def test_ablating_a_feature_removes_what_it_wrote() -> None:
    sae = some_sae("relu")
    before, after = apply(Tier.DELTA, sae, [Clamp(3, "absolute", 0.0)])
    f = torch.stack([sae.encode(x)[3] for x in before.double()])
    assert f.any()
    removed = f[:, None] * sae.W_dec[3]
    assert torch.equal((before - after).double(), removed)


def test_ablating_every_feature_leaves_the_decoder_bias() -> None:
    rng = np.random.default_rng(2)
    sae = exact_sae(rng, MAX_CLAMPS, D, "relu")
    _, after = apply(
        Tier.FULL, sae, [Clamp(i, "absolute", 0) for i in range(MAX_CLAMPS)]
    )
    assert torch.equal(after.double(), sae.b_dec.expand_as(after))


@pytest.mark.parametrize("kind", ["absolute", "additive", "scale"])
@pytest.mark.parametrize("only_if_active", [False, True])
def test_a_conditional_clamp_acts_on_active_features_only(
    kind: str, only_if_active: bool
) -> None:
    sae = exact_sae(np.random.default_rng(0), 2, 2, "relu")
    sae.W_enc.zero_()
    sae.b_enc.copy_(torch.tensor([-1.0, 0.5]))
    sae.W_dec.copy_(torch.eye(2))
    clamps = [Clamp(i, kind, 3.0, only_if_active) for i in range(2)]
    before, after = apply(Tier.DELTA, sae, clamps, num_tokens=1)
    acted = {"absolute": (3.0, 2.5), "additive": (3.0, 3.0), "scale": (0.0, 1.0)}[kind]
    silent = 0.0 if only_if_active else acted[0]
    assert (after - before)[0].tolist() == [silent, acted[1]]


def test_clamps_of_one_row_do_not_see_each_other() -> None:
    acts = torch.tensor([1.0, 2.0]).double()
    clamps = [Clamp(0, "absolute", 5.0), Clamp(1, "scale", 2.0)]
    assert clamped(acts, clamps).tolist() == clamped(acts, clamps[::-1]).tolist()
    sae = some_sae("topk")
    both = [Clamp(0, "absolute", 5.0), Clamp(1, "scale", 2.0)]
    assert torch.equal(
        apply(Tier.FULL, sae, both)[1], apply(Tier.FULL, sae, both[::-1])[1]
    )


@settings(max_examples=30)
@given(seed=st.integers(0, 2**31), num_tokens=st.integers(0, 6))
def test_vectors_add_scaled_directions(seed: int, num_tokens: int) -> None:
    rng = np.random.default_rng(seed)
    slot = VectorSlot(3, D, 6, 3, CPU)
    slot.directions.copy_(torch.from_numpy(rng.integers(-4, 5, (3, D)) * 0.25))
    scales = rng.integers(-4, 5, (2, 3)) * 0.5
    for row in (1, 2):
        clamps = [
            Clamp(at, "additive", float(s)) for at, s in enumerate(scales[row - 1])
        ]
        set_row(slot.table, row, clamps)
    rows = rng.integers(0, 3, num_tokens)
    case = bench(rng, num_tokens, D, (), slot, {Tier.ADDITIVE: rows.tolist()})
    expected = case.stream.double()
    for at, row in enumerate(rows):
        if row:
            scale = torch.from_numpy(scales[row - 1])
            expected[at] += scale @ slot.directions.double()
    case.run("apply_steering_vectors")
    assert torch.equal(case.stream.double(), expected)


def test_bypassed_tokens_are_counted_once_for_each_module_that_edits_them() -> None:
    step = StepState(8, torch.device("cpu"), vocab_size=10)
    step.skip_bits[torch.tensor([1, 2])] = torch.tensor([1, 2], dtype=torch.int32)
    saes = [load_slot(random_sae(F, D, "relu", seed)) for seed in range(3)]
    # The first module has two sites; the rows of both edit.
    set_row(saes[0].full, 1, [])
    set_row(saes[1].full, 1, [])
    set_row(saes[1].delta, 2, [Clamp(3, "absolute", 1.0)])
    set_row(saes[2].full, 2, [])
    tables = [(sae.delta, sae.full) for sae in saes]
    step.bypass.watch([Bypass("a", 1, tables[:2]), Bypass("b", 2, tables[2:])])
    step.index[Tier.FULL, :6] = torch.tensor([1, 1, 2, 0, 2, 0], dtype=torch.int32)
    step.index[Tier.DELTA, 3] = 2
    step.index[Tier.ADDITIVE, 5] = 1
    backend = ReferenceBackend(step)
    backend.write_flags(torch.tensor([1, 5, 2, 1, 1, 1]))
    assert step.flags.tolist() == [1, 0, 2, 1, 1, 1, 0, 0]
    # 0 by its full row, 3 by its delta row; 4 has a row of the other module only.
    assert step.bypass.counts.tolist() == [2, 1]
    backend.write_flags(torch.tensor([99, -1, 5]))
    assert step.bypass.counts.tolist() == [2, 1]
