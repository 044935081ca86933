# SPDX-License-Identifier: Apache-2.0
"""The SAE tiers' ops with a source: the algebra of transcoders."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from steering_testing.reference import Clamp, DenseSAE, delta, full
from steering_testing.sites import CPU, MAX_CLAMPS, ROWS, bench, exact_sae, set_row

from vllm.config.steering import Activation, SiteInfo, Tier
from vllm.config.steering_points import HookPoint
from vllm.model_executor.layers.steering_attach import attach_site  # noqa: F401
from vllm.model_executor.layers.steering_reference import full_reconstruction
from vllm.model_executor.layers.steering_state import SAESlot, SAEWeights

D_IN, D_OUT, F, T = 6, 10, 20, 5
CLAMPS = [Clamp(2, "absolute", 3.0), Clamp(4, "scale", -2.0)]
INDEX = [1, 0, 1, 1, 0]


def transcoder(rng: np.random.Generator, skip: bool = True) -> DenseSAE:
    encoder, decoder = (exact_sae(rng, F, width, "relu") for width in (D_IN, D_OUT))
    one = DenseSAE(encoder.W_enc, encoder.b_enc, decoder.W_dec, decoder.b_dec)
    if skip:
        one.W_skip = torch.from_numpy(rng.integers(-3, 4, (D_OUT, D_IN)) / 4.0)
    return one


def slot_of(one: DenseSAE, norm_limit: float | None = None) -> SAESlot:
    skip = one.W_skip is not None
    site = SiteInfo(
        0, HookPoint.MLP_IN, D_IN, F, hook_out=HookPoint.MLP_OUT, d_out=D_OUT,
        has_skip=skip,
    )  # fmt: skip
    weights = SAEWeights.for_site(site, torch.float32, CPU)
    weights.W_enc.copy_(one.W_enc)
    weights.b_enc.copy_(one.b_enc)
    weights.threshold.zero_()
    weights.W_dec.copy_(one.W_dec)
    weights.b_dec.copy_(one.b_dec)
    if weights.W_skip is not None and one.W_skip is not None:
        weights.W_skip.copy_(one.W_skip)
    weights.set_meta(site, 0, norm_limit)
    kinds = frozenset({Activation.RELU})
    slot = SAESlot(weights, ROWS, MAX_CLAMPS, kinds, reads_source=True)
    for table in (slot.delta, slot.full):
        set_row(table, 1, CLAMPS)
    return slot


@pytest.mark.parametrize("tier", [Tier.DELTA, Tier.FULL])
@pytest.mark.parametrize("skip", [False, True])
def test_a_tier_reads_the_source_and_writes_the_output(tier: Tier, skip: bool) -> None:
    rng = np.random.default_rng(3)
    one = transcoder(rng, skip)
    rows = {tier: INDEX}
    case = bench(rng, T, D_OUT, [slot_of(one)], rows=rows, single_stream=True)
    source = torch.from_numpy(rng.integers(-8, 9, (T, D_IN)) / 8.0).float()
    kept, before = source.clone(), case.hidden.clone()
    op = "apply_sae_clamp" if tier is Tier.DELTA else "apply_sae_full_reconstruction"
    with case.forward():
        getattr(torch.ops.vllm, op)(case.hidden, None, case.site.name, source)
    assert torch.equal(source, kept)
    for at, row in enumerate(INDEX):
        x, read = before[at].double(), source[at].double()
        if row == 0:
            assert torch.equal(case.hidden[at], before[at])
        elif tier is Tier.FULL:
            assert torch.equal(case.hidden[at].double(), full(one, CLAMPS, read))
        else:
            expected = delta(one, CLAMPS, x, read)
            assert torch.equal(case.hidden[at].double(), expected)


@pytest.mark.parametrize("op", ["apply_sae_clamp", "apply_sae_full_reconstruction"])
def test_the_ops_pass_opcheck_with_a_source(op: str) -> None:
    rng = np.random.default_rng(3)
    rows = {Tier.DELTA: INDEX, Tier.FULL: INDEX}
    slot = slot_of(transcoder(rng))
    case = bench(rng, T, D_OUT, [slot], rows=rows, single_stream=True)
    call = getattr(torch.ops.vllm, op).default
    with case.forward():
        arguments = (case.hidden, None, case.site.name, torch.ones(T, D_IN))
        torch.library.opcheck(call, arguments)


def test_a_silent_transcoder_with_an_identity_skip_copies_its_input() -> None:
    rng = np.random.default_rng(4)
    one = transcoder(rng)
    one.b_enc = torch.full((F,), -1e6).double()
    one.b_dec = torch.zeros(D_OUT).double()
    one.W_skip = torch.eye(D_OUT, D_IN).double()
    slot = slot_of(one)
    set_row(slot.full, 1, [])
    case = bench(rng, T, D_OUT, [slot], rows={Tier.FULL: [1] * T}, single_stream=True)
    source = torch.randn(T, D_IN)
    full_reconstruction(slot, case.step, case.hidden, None, source)
    assert torch.equal(case.hidden[:, :D_IN], source)
    assert not case.hidden[:, D_IN:].any()


def test_the_norm_guard_looks_at_the_source() -> None:
    rng = np.random.default_rng(5)
    slot = slot_of(transcoder(rng), norm_limit=1.0)
    case = bench(rng, T, D_OUT, [slot], rows={Tier.FULL: [1] * T}, single_stream=True)
    before = case.hidden.clone()
    source = torch.zeros(T, D_IN)
    source[2] = 5.0
    full_reconstruction(slot, case.step, case.hidden, None, source)
    same = [bool(torch.equal(case.hidden[at], before[at])) for at in range(T)]
    assert same == [False, False, True, False, False]
