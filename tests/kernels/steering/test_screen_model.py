# SPDX-License-Identifier: Apache-2.0
"""The bounds of the screen on a CPU: no feature that fires is missed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from screen_model import accumulate, copy_of, may_fire, split

from vllm.config.steering import Activation
from vllm.config.steering_screening import fine_bytes, padded
from vllm.model_executor.layers.steering_kernels.screen import (
    SCREEN_TOKENS,
    accumulation_error,
    candidates,
    pack_codes,
    round_up,
)
from vllm.model_executor.layers.steering_kernels.workspace import SteeringWorkspace
from vllm.model_executor.layers.steering_state import SAESlot, SAEWeights

DTYPES = (torch.bfloat16, torch.float16)
WIDTHS = (8, 72, 576, 1000)
ROWS = 24


def weights_of(kind: str, d_in: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of one kind; products and sums of float16 stay finite."""
    w = torch.randn(ROWS, d_in) / d_in**0.5
    if kind == "heavy rows":
        w *= torch.exp(4 * torch.randn(ROWS, 1)).clamp(max=500)
        w[torch.arange(ROWS), torch.randint(d_in, (ROWS,))] += 20
    elif kind == "small and zero":
        w *= 10.0 ** torch.randint(-45, 0, (ROWS, 1))
        w[::4] = 0
    elif kind == "one component":
        w.zero_()
        w[torch.arange(ROWS), torch.randint(d_in, (ROWS,))] = 1.5
    elif kind == "equal":
        w.fill_(0.05)
    return w.to(dtype)


def token_of(kind: str, w: torch.Tensor) -> torch.Tensor:
    d_in = w.shape[1]
    x = torch.randn(d_in)
    if kind == "massive":
        x[torch.randperm(d_in)[:2]] = torch.tensor([3000.0, -900.0])
    elif kind == "tiny":
        x *= 1e-20
    elif kind == "zero":
        x.zero_()
    elif kind == "along a row":
        x = w[0].float().clone()
    elif kind.startswith("along"):
        # The worst direction: all of the copy's error counts.
        copy = copy_of(w)
        scale = copy.rows[0, 0].double()
        wrong = w[0].double() - scale * copy.q[0, :d_in]
        if kind.startswith("along what ten"):
            wrong = wrong - scale / 8 * copy.c[0, :d_in]
        x = (wrong / wrong.abs().max().clamp(min=1e-30)).float()
    return x.to(w.dtype)


KINDS = ("normal", "heavy rows", "small and zero", "one component", "equal")
TOKENS = (
    "normal", "massive", "tiny", "zero", "along a row", "along what eight bits leave",
    "along what ten bits leave",
)  # fmt: skip


@settings(max_examples=150)
@given(
    st.integers(0, 2**31 - 1),
    st.sampled_from(KINDS),
    st.sampled_from(TOKENS),
    st.sampled_from(WIDTHS),
    st.sampled_from(DTYPES),
)
def test_what_the_encoder_lets_fire_is_a_candidate(
    seed: int, kind: str, token: str, d_in: int, dtype: torch.dtype
) -> None:
    """Bars just below each sum, where a bound that is too small would miss it."""
    torch.manual_seed(seed)
    w = weights_of(kind, d_in, dtype)
    x = token_of(token, w)
    total = accumulate(w, x)
    cut = torch.nextafter(total, torch.full_like(total, -float("inf")))
    assert (total > cut).all()
    for fine in (False, True):
        assert may_fire(copy_of(w), split(x), cut, fine).all()


@settings(max_examples=100)
@given(
    st.integers(0, 2**31 - 1),
    st.sampled_from(KINDS),
    st.sampled_from(TOKENS),
    st.sampled_from(DTYPES),
)
def test_the_bound_holds_for_any_order_of_additions(
    seed: int, kind: str, token: str, dtype: torch.dtype
) -> None:
    """The exact product plus all that an accumulator may gain is within the bound."""
    torch.manual_seed(seed)
    w = weights_of(kind, 576, dtype)
    x = token_of(token, w)
    exact = w.double() @ x.double()
    gain = accumulation_error(576) * w.double().norm(dim=1) * x.double().norm()
    cut = torch.nextafter((exact + gain).float(), torch.tensor(-float("inf")))
    nonzero = w.abs().amax(1) > 0
    for fine in (False, True):
        assert may_fire(copy_of(w), split(x), cut, fine)[nonzero].all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_model_of_the_accumulator_keeps_within_its_error(
    dtype: torch.dtype,
) -> None:
    """And comes near enough to it that the model tests something."""
    w, x = torch.full((1, 4096), 0.3).to(dtype), torch.full((4096,), 0.7).to(dtype)
    exact = w.double() @ x.double()
    allowed = accumulation_error(4096) * w.double().norm(dim=1) * x.double().norm()
    error = (accumulate(w, x).double() - exact).abs()
    assert allowed / 100 < error < allowed


def test_few_features_are_candidates() -> None:
    """A normal SAE and stream: the bounds are about 0.2 and 0.05 of a score's deviation
    here; 0.00135 of all features fire."""
    torch.manual_seed(0)
    w = (torch.randn(4000, 576) / 24).bfloat16()
    copy, cut = copy_of(w), torch.full((4000,), 3.0)
    tokens = [split(torch.randn(576).bfloat16()) for _ in range(8)]
    coarse, fine = (
        sum(may_fire(copy, token, cut, fine).double().mean() for token in tokens) / 8
        for fine in (False, True)
    )
    assert 0.0013 < coarse < 0.0035
    assert 0.0011 < fine < 0.0019 and fine < coarse


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_row_without_a_bound_is_always_a_candidate(value: float) -> None:
    w = torch.randn(4, 72).bfloat16()
    w[2, 7] = value
    copy = copy_of(w)
    assert not copy.q[2].any()
    far = torch.full((4,), 1e30)
    may = may_fire(copy, split(torch.randn(72).bfloat16()), far)
    assert may.tolist() == [False, False, True, False]


def test_features_that_cannot_fire_are_no_candidates() -> None:
    """Padding has an infinite bar; a row of zeros sums to zero."""
    w = torch.zeros(2, 72).bfloat16()
    token = split(torch.randn(72).bfloat16())
    assert not may_fire(copy_of(w), token, torch.tensor([0.0, float("inf")])).any()
    assert may_fire(copy_of(w), token, torch.tensor([-1.0, -1e-30])).all()


def test_quantise_fills_every_byte_chunk_after_chunk() -> None:
    w = torch.randn(4100, 72).half()
    whole = copy_of(w)
    for first in (0, 2048, 4096):
        part = copy_of(w[first : first + 2048])
        assert torch.equal(whole.q[first : first + 2048], part.q)
        assert torch.equal(whole.rows[first : first + 2048], part.rows)
        assert torch.equal(whole.fine[first : first + 2048], part.fine)
    assert whole.q.abs().max() == 127


def test_round_up_never_rounds_down() -> None:
    exact = torch.rand(10_000, dtype=torch.float64) * 10.0 ** torch.randint(
        -30, 30, (10_000,)
    )
    up = round_up(exact).double()
    assert (up >= exact).all() and (up <= exact * (1 + 2.0**-22)).all()


def test_two_more_bits_make_the_error_a_quarter() -> None:
    # float16: the values of bfloat16 are so coarse that a row's errors are not uniform.
    w = (torch.randn(50, 1000) / 30).half()
    copy = copy_of(w)
    unit = copy.rows[:, :1].double()
    left = w.double() - unit * copy.q[:, :1000] - unit / 8 * copy.c[:, :1000]
    assert (left.abs() <= unit / 8 * 1.001).all()
    a, finer = copy.rows[:, 1], copy.rows[:, 3]
    assert (left.norm(dim=1) < finer).all() and (finer < 0.3 * a).all()


def test_packed_codes_fill_their_groups() -> None:
    codes = torch.randint(0, 4, (3, 300), dtype=torch.uint8)
    packed = pack_codes(codes)
    assert packed.shape == (3, fine_bytes(300)) == (3, 128)
    copy = copy_of(torch.zeros(3, 300).bfloat16())
    copy.fine.copy_(packed.view(torch.int8))
    assert torch.equal(copy.c[:, :300], 2 * codes.long() - 3)


def test_widths_of_copies() -> None:
    assert [padded(d) for d in (8, 128, 136, 5376)] == [128, 128, 256, 5376]
    assert [fine_bytes(d) for d in (8, 256, 264, 5376)] == [64, 64, 128, 1344]
    assert [candidates(f) for f in (1, 256, 300, 131072)] == [256, 256, 512, 131072]


def test_the_scratch_of_the_widest_encoders_is_beside_the_workspaces_limit() -> None:
    def workspace(screened: bool) -> SteeringWorkspace:
        meta = torch.device("meta")
        w = SAEWeights(524288, 8192, torch.bfloat16, meta, screened=screened)
        return SteeringWorkspace(
            256, [SAESlot(w, 9, 8, frozenset({Activation.JUMPRELU}))], meta
        )

    plain, screened = workspace(False), workspace(True)
    more = screened.screen.nbytes - plain.screen.nbytes
    assert screened.nbytes - plain.nbytes == more
    assert 0 < more - 524288 * (4 * SCREEN_TOKENS + 2 * 4) < 2 << 20
