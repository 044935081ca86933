# SPDX-License-Identifier: Apache-2.0
"""What a tier writes back is finite, whatever was asked, and so is what follows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from steering_testing.reference import Clamp, random_sae
from steering_testing.sites import (
    CPU,
    MAX_CLAMPS,
    Bench,
    bench,
    load_slot,
    set_row,
)

from vllm.config.steering import Tier
from vllm.config.steering_points import HookPoint
from vllm.model_executor.layers import sae_full_reconstruction, sae_steering  # noqa: F401
from vllm.model_executor.layers.steering import (
    SiteKey,
    SteeringSite,
    apply_layer_steering,
)
from vllm.model_executor.layers.steering_limits import (
    POINT_LIMIT,
    STREAM_LIMIT,
)
from vllm.model_executor.layers.steering_state import (
    VectorSlot,
)

D, F, TOKENS = 32, 96, 7
OPS = {
    Tier.ADDITIVE: "apply_steering_vectors",
    Tier.DELTA: "apply_sae_clamp",
    Tier.FULL: "apply_sae_full_reconstruction",
}
DTYPES = tuple(STREAM_LIMIT)
LARGEST = torch.finfo(torch.float32).max

wild = st.floats(width=32, allow_nan=False, allow_infinity=False)
huge = st.sampled_from([LARGEST, -LARGEST, 1e30, -1e30, 1e6, 3e38, 2.0**96])


@st.composite
def clamp_lists(draw: st.DrawFn) -> list[Clamp]:
    features = draw(
        st.lists(st.integers(0, F - 1), min_size=1, max_size=MAX_CLAMPS, unique=True)
    )
    return [
        Clamp(
            feature,
            draw(st.sampled_from(["absolute", "additive", "scale"])),
            draw(wild | huge),
            draw(st.booleans()),
        )
        for feature in features
    ]


def steered(
    tier: Tier,
    clamps: Sequence[Clamp],
    dtype: torch.dtype,
    activation: str = "jumprelu",
    single_stream: bool = False,
) -> Bench:
    """A step whose even tokens have the clamps and whose odd ones are plain."""
    slot = load_slot(random_sae(F, D, activation, 3, k=12), dtype)
    vectors = VectorSlot(F, D, 6, MAX_CLAMPS, CPU)
    vectors.directions.copy_(slot.weights.W_dec.float())
    if tier is Tier.ADDITIVE:
        clamps = [Clamp(c.feature, "additive", c.value) for c in clamps]
        set_row(vectors.table, 1, clamps)
    else:
        set_row(slot.full if tier is Tier.FULL else slot.delta, 1, clamps)
    rows = [1 - at % 2 for at in range(TOKENS)]
    rng = np.random.default_rng(0)
    return bench(rng, TOKENS, D, [slot], vectors, {tier: rows}, dtype, single_stream)


def saturated(case: Bench, tier: Tier) -> int:
    """What the slot of the tier has counted."""
    if tier is not Tier.ADDITIVE:
        assert case.site.vectors is not None
        assert not case.site.vectors.saturated.any()
        return int(case.site.saes[0].saturated)
    assert not case.site.saes[0].saturated.any()
    return int(case.site.vectors.saturated.max())


def assert_survivable(case: Bench, dtype: torch.dtype) -> None:
    """The stream is within the limit; a norm and another such term stay finite."""
    x = case.stream[::2]
    limit = STREAM_LIMIT[dtype]
    assert torch.isfinite(x).all()
    assert float(x.abs().max()) <= limit
    assert torch.isfinite(x.float().square().sum(1)).all()
    assert torch.isfinite(x + torch.full_like(x, limit * 0.99)).all()


@settings(max_examples=150)
@given(
    clamps=clamp_lists(),
    tier=st.sampled_from(list(Tier)),
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(["relu", "jumprelu", "topk"]),
    single_stream=st.booleans(),
)
def test_no_clamp_writes_what_is_not_finite(
    clamps: list[Clamp],
    tier: Tier,
    dtype: torch.dtype,
    activation: str,
    single_stream: bool,
) -> None:
    case = steered(tier, clamps, dtype, activation, single_stream)
    before = case.stream.clone()
    plain = case.hidden[1::2].clone()
    case.run(OPS[tier])
    assert_survivable(case, dtype)
    assert torch.equal(case.stream[1::2], before[1::2])
    assert torch.equal(case.hidden[1::2], plain)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tier", list(Tier))
def test_saturated_tokens_point_where_the_clamp_points_and_are_counted(
    tier: Tier, dtype: torch.dtype
) -> None:
    case = steered(tier, [Clamp(5, "absolute", -3e38)], dtype)
    case.run(OPS[tier])
    direction = case.site.saes[0].weights.W_dec[5].float()
    limit = STREAM_LIMIT[dtype]
    expected = (-direction.sign() * limit).expand(4, D)
    assert torch.equal(case.stream[::2].float(), expected)
    assert saturated(case, tier) == 4


@pytest.mark.parametrize("tier", list(Tier))
def test_ordinary_clamps_saturate_nothing(tier: Tier) -> None:
    case = steered(tier, [Clamp(5, "absolute", 8.0)], torch.float32)
    case.run(OPS[tier])
    assert saturated(case, tier) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tier", list(Tier))
def test_a_token_that_is_not_finite_is_left_alone(
    tier: Tier, dtype: torch.dtype, bad: float
) -> None:
    case = steered(tier, [Clamp(5, "absolute", 3e38)], dtype)
    case.hidden[2, 7] = bad
    hidden, residual = case.hidden.clone(), case.residual.clone()
    case.run(OPS[tier])
    view = torch.int32 if dtype is torch.float32 else torch.int16
    for now, was in ((case.hidden, hidden), (case.residual, residual)):
        assert torch.equal(now[2].view(view), was[2].view(view))
    assert saturated(case, tier) == 3


def test_a_token_is_counted_once_for_each_vector_that_its_row_uses() -> None:
    """A row may list a vector twice, as bounds do."""
    clamps = [Clamp(at, "additive", 3e38) for at in (5, 7, 5)]
    case = steered(Tier.ADDITIVE, clamps, torch.float32)
    case.run(OPS[Tier.ADDITIVE])
    counted = case.site.vectors.saturated
    assert counted.nonzero().squeeze(1).tolist() == [5, 7]
    assert counted[[5, 7]].tolist() == [4, 4]


def test_sums_that_overflow_both_ways_are_finite() -> None:
    """Decoder rows near float32's end: coefficients within bounds still overflow."""
    slot = load_slot(random_sae(F, D, "relu", 3))
    slot.weights.W_dec[0] = 1e38
    slot.weights.W_dec[1] = -1e38
    set_row(slot.full, 1, [Clamp(0, "absolute", 1e30), Clamp(1, "absolute", 1e30)])
    rng = np.random.default_rng(0)
    case = bench(rng, 2, D, [slot], rows={Tier.FULL: [1, 0]})
    case.run(OPS[Tier.FULL])
    assert torch.isfinite(case.stream).all()
    assert float(case.stream[0].abs().max()) <= STREAM_LIMIT[torch.float32]


@pytest.mark.parametrize("hook", list(POINT_LIMIT))
@pytest.mark.parametrize("tier", list(Tier))
def test_points_that_a_linear_layer_reads_have_limits_of_their_own(
    tier: Tier, hook: HookPoint
) -> None:
    clamps = [Clamp(5, "absolute", 3e38)]
    case = steered(tier, clamps, torch.bfloat16, single_stream=True)
    plain = case.hidden[1::2].clone()
    site = case.site
    case.site = SteeringSite(
        SiteKey(0, hook), site.saes, site.vectors, case.step, site.backend
    )
    with case.forward():
        apply_layer_steering(case.site, case.hidden, None)
    assert float(case.hidden.abs().max()) == POINT_LIMIT[hook]
    assert torch.equal(case.hidden[1::2], plain)
