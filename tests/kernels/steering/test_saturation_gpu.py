# SPDX-License-Identifier: Apache-2.0
"""What a kernel writes is finite, and is what `steering_reference` writes."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from steering_reference import (
    DEVICE,
    INTERPRETED,
    Clamp,
    make_slot,
    make_step,
    make_stream,
    needs_gpu,
    set_row,
)

from vllm.config.steering import Activation, Tier
from vllm.model_executor.layers import (
    sae_full_reconstruction_kernel as kernel,
)
from vllm.model_executor.layers import steering_reference as plain
from vllm.model_executor.layers.steering_limits import (
    STREAM_LIMIT,
)
from vllm.model_executor.layers.steering_state import (
    ClampKind,
    SAESlot,
    StepState,
    VectorSlot,
)

pytestmark = [
    pytest.mark.gpu,
    needs_gpu,
    pytest.mark.usefixtures("implementation"),
]
DTYPES = [torch.float16, torch.float32]
if not INTERPRETED:  # the interpreter rounds bfloat16 differently
    DTYPES.append(torch.bfloat16)
D, F, TOKENS = 64, 200, 12
HUGE = 3e38
# What a client may send: each alone drives the stream past every limit.
POISON: dict[str, list[Clamp]] = {
    "scale": [(f, ClampKind.SCALE, HUGE, False) for f in range(8)],
    "absolute": [(3, ClampKind.ABSOLUTE, HUGE, False)],
    "opposite": [
        (f, ClampKind.ADDITIVE, HUGE if f % 2 else -HUGE, False) for f in range(8)
    ],
    "moderate": [(5, ClampKind.ADDITIVE, 1e6, False)],
}
Streams = tuple[torch.Tensor, torch.Tensor | None]


def make(
    tier: Tier, activation: Activation, dtype: torch.dtype, clamps: list[Clamp]
) -> SAESlot | VectorSlot:
    """A slot whose row 1 has the clamps and whose row 2 is harmless."""
    mild: list[Clamp] = [(1, ClampKind.ADDITIVE, 0.5, False)]
    if tier is Tier.ADDITIVE:
        vectors = VectorSlot(F, D, 5, 8, DEVICE)
        vectors.directions.copy_(torch.randn(F, D))
        table = vectors.table
    else:
        sae = make_slot(F, D, activation, l0=60, k=60, dtype=dtype)
        table = sae.full if tier is Tier.FULL else sae.delta
    set_row(table, 1, [(f, ClampKind.ADDITIVE, v, False) for f, _, v, _ in clamps]
            if tier is Tier.ADDITIVE else clamps)  # fmt: skip
    set_row(table, 2, mild)
    return vectors if tier is Tier.ADDITIVE else sae


def run(
    slot: SAESlot | VectorSlot, tier: Tier, step: StepState, streams: Streams, how: str
) -> Streams:
    """A copy of the streams, edited by the kernels or by plain PyTorch."""
    hidden = streams[0].clone()
    residual = None if streams[1] is None else streams[1].clone()
    if how == "kernel" and isinstance(slot, SAESlot):
        workspace = kernel.SteeringWorkspace(TOKENS, [slot], DEVICE)
        op = kernel.full_reconstruction if tier is Tier.FULL else kernel.sae_clamp
        op(slot, step, workspace, hidden, residual)
    elif how == "kernel":
        assert isinstance(slot, VectorSlot)
        kernel.steering_vectors(slot, step, hidden, residual)
    elif isinstance(slot, VectorSlot):
        plain.steering_vectors(slot, step, hidden, residual)
    else:
        ref = plain.full_reconstruction if tier is Tier.FULL else plain.sae_clamp
        ref(slot, step, hidden, residual)
    return hidden, residual


def written(streams: Streams) -> torch.Tensor:
    return streams[0] if streams[1] is None else streams[1]


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int32 if x.element_size() == 4 else torch.int16)


@pytest.mark.parametrize("tier", list(Tier))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize("activation", [Activation.JUMPRELU, Activation.TOPK])
@pytest.mark.parametrize("two_streams", [True] if INTERPRETED else [True, False])
def test_poison_is_limited_and_counted_as_the_reference_does(
    tier: Tier,
    dtype: torch.dtype,
    poison: str,
    activation: Activation,
    two_streams: bool,
) -> None:
    slot = make(tier, activation, dtype, POISON[poison])
    step = make_step(TOKENS, TOKENS, [1, 0, 2], tier)
    before = make_stream(TOKENS, D, dtype, two_streams)
    want = run(slot, tier, step, before, "plain")
    counted = slot.saturated.clone()
    slot.saturated.zero_()
    found = run(slot, tier, step, before, "kernel")
    assert slot.saturated.tolist() == counted.tolist()
    wanted = int(counted.max())
    if tier is Tier.ADDITIVE and wanted:
        vectors = {feature for feature, *_ in POISON[poison]}
        assert counted.nonzero().squeeze(1).tolist() == sorted(vectors)
    if abs(POISON[poison][0][2]) == HUGE:  # `scale` spares a token that is silent
        assert 1 <= wanted <= TOKENS // 3
    x, y = written(found).double(), written(want).double()
    assert x.isfinite().all() and x.abs().max() <= STREAM_LIMIT[dtype]
    # Where the reference is at the limit, so is the kernel; elsewhere they are close.
    # Sums of huge terms that cancel may round to either side of a limit.
    tolerance = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}
    close = (x - y).abs() <= tolerance[dtype] * (1 + y.abs())
    assert close[1::3].all() and close[2::3].all()
    if poison != "opposite":
        assert close.float().mean() > 0.99


@pytest.mark.parametrize("tier", list(Tier))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("activation", [Activation.JUMPRELU, Activation.TOPK])
def test_a_token_that_is_not_finite_keeps_its_bits_and_is_not_counted(
    tier: Tier, dtype: torch.dtype, value: float, activation: Activation
) -> None:
    slot = make(tier, activation, dtype, POISON["moderate"])
    step = make_step(TOKENS, TOKENS, [2], tier)
    before = make_stream(TOKENS, D, dtype)
    before[0][4, 17] = value
    found = run(slot, tier, step, before, "kernel")
    for old, new in zip(before, found, strict=True):
        assert old is not None and new is not None
        assert torch.equal(bits(old[4]), bits(new[4]))
    assert not slot.saturated.any()
    others = [t for t in range(TOKENS) if t != 4]
    assert not found[0][others].any()
    assert written(found)[others].isfinite().all()


@pytest.mark.parametrize("tier", list(Tier))
def test_a_norm_that_float32_does_not_hold_is_no_finite_stream(tier: Tier) -> None:
    slot = make(tier, Activation.JUMPRELU, torch.float32, POISON["moderate"])
    step = make_step(TOKENS, TOKENS, [2], tier)
    before = make_stream(TOKENS, D, torch.float32)
    before[0][3, 5] = 1e25
    found = run(slot, tier, step, before, "kernel")
    assert torch.equal(bits(before[0][3]), bits(found[0][3]))
