# SPDX-License-Identifier: Apache-2.0
"""Transcoders on the GPU: another input than output, a skip connection, a source.

The kernels are compared with `steering_reference`, which tests of its own hold against
float64 mathematics. `TRITON_INTERPRET=1` runs them on a CPU that has Triton.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from steering_reference import (
    DEVICE,
    DTYPE,
    INTERPRETED,
    make_step,
    needs_gpu,
    random_clamps,
    set_row,
)

from vllm.config.steering import Activation, SiteInfo, Tier
from vllm.config.steering_points import HookPoint
from vllm.model_executor.layers import (
    sae_full_reconstruction_kernel as kernel,
)
from vllm.model_executor.layers import steering_reference as plain
from vllm.model_executor.layers.steering_kernels import stages_cuda
from vllm.model_executor.layers.steering_kernels.extension import (
    extension_is_built,
)
from vllm.model_executor.layers.steering_kernels.plan import (
    COMPACT_ENCODE_TOKENS,
    LIST_MAX,
    sorts_ahead,
)
from vllm.model_executor.layers.steering_state import (
    MetaField,
    SAESlot,
    SAEWeights,
)

pytestmark = [pytest.mark.gpu, needs_gpu]
KINDS = [Activation.JUMPRELU, Activation.TOPK]
WIDTHS = [(40, 56)] if INTERPRETED else [(40, 56), (96, 96), (33, 71), (1152, 768)]
TOKENS = 9
# One launch compacts and encodes; two do; lists are sorted in a launch of their own.
LENGTHS = [TOKENS, COMPACT_ENCODE_TOKENS + 44, 1024]
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 1e-4}


def make_transcoder(
    d_in: int,
    d_out: int,
    activation: Activation,
    skip: bool,
    d_sae: int = 150,
    dtype: torch.dtype = DTYPE,
) -> SAESlot:
    """A random transcoder about a tenth of whose features fire."""
    weights = SAEWeights(d_sae, d_in, dtype, DEVICE, d_out, skip)
    slot = SAESlot(weights, 5, 8, frozenset({activation}), reads_source=True)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=DEVICE)

    weights.W_enc.copy_(normal(d_sae, d_in) / d_in**0.5)
    weights.W_dec.copy_(normal(d_sae, d_out) / d_out**0.5)
    weights.b_enc.copy_(0.1 * normal(d_sae))
    weights.b_dec.copy_(normal(d_out))
    weights.threshold.fill_(1.28)
    if weights.W_skip is not None:
        weights.W_skip.copy_(normal(d_out, d_in) / d_in**0.5)
    k = 12 if activation is Activation.TOPK else None
    site = SiteInfo(
        0, HookPoint.MLP_IN, d_in, d_sae, activation, k,
        hook_out=HookPoint.MLP_OUT, d_out=d_out, has_skip=skip,
    )  # fmt: skip
    weights.set_meta(site, 0b10, None)
    for table in (slot.full, slot.delta):
        set_row(table, 1, [])
        set_row(table, 2, random_clamps(d_sae, 8))
    return slot


def is_close_call(slot: SAESlot, source: torch.Tensor) -> torch.Tensor:
    """Tokens with a score that is closer to what decides about it than rounding is.

    That is the threshold, or the next score of the k-th.
    """
    weights = slot.weights
    k = int(weights.meta[MetaField.K])
    scores = source.double() @ weights.W_enc.double().T + weights.b_enc.double()
    if Activation.TOPK not in slot.activations:
        return ((scores - weights.threshold.double()).abs() < 1e-5).any(dim=1)
    if k >= weights.d_sae_capacity:
        return torch.zeros(len(source), dtype=torch.bool, device=DEVICE)
    best = scores.topk(k + 1, dim=1).values
    return best[:, k - 1] - best[:, k] < 1e-5


def compare(
    slot: SAESlot, tier: Tier, two_streams: bool = True, tokens: int = TOKENS
) -> torch.Tensor:
    """Both ways on one random step; returns what the kernels wrote."""
    weights = slot.weights
    dtype = weights.W_enc.dtype
    step = make_step(tokens, tokens, [1, 2, 0], tier)
    step.flags[4] = 0b10
    hidden = torch.randn(tokens, weights.d_out, device=DEVICE).to(dtype)
    residual = hidden.flip(0).clone() if two_streams else None
    source = torch.randn(tokens, weights.d_in, device=DEVICE).to(dtype)
    source[7, 3] = float("inf")  # not finite: left alone
    found = [hidden.clone(), None if residual is None else residual.clone()]
    want = [hidden.clone(), None if residual is None else residual.clone()]
    workspace = kernel.SteeringWorkspace(tokens, [slot], DEVICE)
    workspace._shared.fill_(0xFF)
    workspace._x.fill_(0xFF)
    if tier is Tier.FULL:
        kernel.full_reconstruction(slot, step, workspace, *found, source)
        plain.full_reconstruction(slot, step, *want, source)
    else:
        kernel.sae_clamp(slot, step, workspace, *found, source)
        plain.sae_clamp(slot, step, *want, source)
    for x, y in zip(found, want, strict=True):
        if x is None or y is None:
            continue
        left = step.index[tier] == 0
        left[[4, 7]] = True
        assert torch.equal(x[left], y[left])
        error = (x.float() - y.float()).norm(dim=1)
        right = error <= TOLERANCE[dtype] * (1 + y.float().norm(dim=1))
        assert (right | is_close_call(slot, source)).all()
    written = found[1] if found[1] is not None else found[0]
    assert written is not None
    return written


@pytest.mark.parametrize("tier", [Tier.DELTA, Tier.FULL])
@pytest.mark.parametrize("activation", KINDS)
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("two_streams", [False, True])
def test_a_transcoder_equals_the_reference(
    tier: Tier,
    activation: Activation,
    widths: tuple[int, int],
    skip: bool,
    two_streams: bool,
) -> None:
    compare(make_transcoder(*widths, activation, skip), tier, two_streams)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tier", [Tier.DELTA, Tier.FULL])
def test_every_dtype_equals_the_reference(dtype: torch.dtype, tier: Tier) -> None:
    if INTERPRETED and dtype is torch.bfloat16:
        pytest.skip("the interpreter has no bfloat16 products")
    slot = make_transcoder(40, 24, Activation.JUMPRELU, True, dtype=dtype)
    compare(slot, tier)


@pytest.mark.parametrize("skip", [False, True])
def test_tokens_that_no_list_holds_equal_the_reference(skip: bool) -> None:
    slot = make_transcoder(24, 40, Activation.JUMPRELU, skip, d_sae=LIST_MAX + 100)
    slot.weights.threshold.zero_()
    slot.weights.b_enc += 3.0
    compare(slot, Tier.FULL)


@pytest.mark.skipif(
    INTERPRETED or not extension_is_built(), reason="needs the CUDA extension"
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("activation", KINDS)
@pytest.mark.parametrize("tier", [Tier.DELTA, Tier.FULL])
@pytest.mark.parametrize("widths", [(4096, 256), (264, 4104)])
def test_the_extension_takes_transcoders_of_any_widths(
    dtype: torch.dtype,
    skip: bool,
    tokens: int,
    activation: Activation,
    tier: Tier,
    widths: tuple[int, int],
) -> None:
    """A block of the delta tier has columns of one side that the other has not."""
    assert sorts_ahead(LENGTHS[2]) and not sorts_ahead(LENGTHS[1])
    slot = make_transcoder(*widths, activation, skip, dtype=dtype)
    streams = [torch.zeros(1, w, dtype=dtype, device=DEVICE) for w in widths]
    assert stages_cuda.takes_cuda(slot, streams[1], None, streams[0])
    assert stages_cuda.takes_clamp(slot, streams[1], None, streams[0])
    compare(slot, tier, two_streams=skip, tokens=tokens)


@pytest.mark.parametrize("activation", KINDS)
@pytest.mark.parametrize("tokens", LENGTHS)
def test_a_long_step_of_tokens_that_no_list_holds_equals_the_reference(
    activation: Activation, tokens: int
) -> None:
    tokens = TOKENS if INTERPRETED else tokens
    slot = make_transcoder(24, 40, activation, True, d_sae=2 * LIST_MAX)
    slot.weights.threshold.zero_()
    slot.weights.b_enc += 3.0
    if activation is Activation.TOPK:
        slot.weights.meta[MetaField.K] = 2 * LIST_MAX
    compare(slot, Tier.FULL, tokens=tokens)


def test_a_source_where_none_is_read_is_refused() -> None:
    slot = make_transcoder(24, 40, Activation.JUMPRELU, False)
    step = make_step(2, 2, [1], Tier.FULL)
    workspace = kernel.SteeringWorkspace(2, [slot], DEVICE)
    hidden = torch.zeros(2, 40, dtype=DTYPE, device=DEVICE)
    with pytest.raises(ValueError, match="source given: False"):
        kernel.full_reconstruction(slot, step, workspace, hidden, None)
    narrow = torch.zeros(2, 23, dtype=DTYPE, device=DEVICE)
    with pytest.raises(ValueError, match=r"source has shape \(2, 23\)"):
        kernel.full_reconstruction(slot, step, workspace, hidden, None, narrow)
