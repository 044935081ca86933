# SPDX-License-Identifier: Apache-2.0
"""Conditions, and vectors that do more than add, against `steering_reference`."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from steering_reference import (
    DEVICE,
    INTERPRETED,
    TOLERANCE,
    Clamp,
    activations,
    make_slot,
    make_step,
    make_stream,
    needs_gpu,
    set_row,
    settle,
    stream,
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
    CONDITION_SHIFT,
    ClampFlag,
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
D, TOKENS = 96, 12 if INTERPRETED else 24
SHAPES = [(200, 60.0), (700, 650.0)]  # lists, and tokens that no list holds
Streams = tuple[torch.Tensor, torch.Tensor | None]


def code(kind: ClampKind, needs: int | None = None, flags: int = 0) -> ClampKind:
    """A code for `set_row`: a kind with flags and the place of a condition."""
    place = 0 if needs is None else (needs + 1) << CONDITION_SHIFT
    return int(kind) | flags | place  # type: ignore[return-value]


def run(
    slot: SAESlot | VectorSlot, tier: Tier, step: StepState, streams: Streams, how: str
) -> torch.Tensor:
    """What the kernels, or plain PyTorch, write for a copy of the streams."""
    hidden = streams[0].clone()
    residual = None if streams[1] is None else streams[1].clone()
    if how == "plain":
        if isinstance(slot, VectorSlot):
            plain.steering_vectors(slot, step, hidden, residual)
        else:
            ref = plain.full_reconstruction if tier is Tier.FULL else plain.sae_clamp
            ref(slot, step, hidden, residual)
    elif isinstance(slot, VectorSlot):
        kernel.steering_vectors(slot, step, hidden, residual)
    else:
        workspace = kernel.SteeringWorkspace(TOKENS, [slot], DEVICE)
        op = kernel.full_reconstruction if tier is Tier.FULL else kernel.sae_clamp
        op(slot, step, workspace, hidden, residual)
    return hidden if residual is None else residual


def compare(
    slot: SAESlot | VectorSlot, tier: Tier, step: StepState, before: Streams
) -> torch.Tensor:
    """Kernels and reference agree; returns the difference that steering made."""
    found = run(slot, tier, step, before, "kernel").double()
    want = run(slot, tier, step, before, "plain").double()
    error = (found - want).norm(dim=1) / want.norm(dim=1).clamp(min=1e-30)
    assert error.max() <= TOLERANCE[before[0].dtype], error
    return want - stream(*before).double()


def conditional_clamps(f: torch.Tensor) -> list[Clamp]:
    """Clamps with conditions that hold for about half of the tokens of `f` [T, F].

    The clamps come in more than one group of eight; conditions follow them.
    """
    often = f.gt(0).sum(0).argsort(descending=True, stable=True)[:3].tolist()
    bars = []
    for i in often:
        values = f[:, i].sort().values
        middle = (values[len(values) // 2 - 1] + values[len(values) // 2]) / 2
        bars.append(float(middle))
    kinds = [ClampKind.ABSOLUTE, ClampKind.ADDITIVE, ClampKind.SCALE]
    count = 12
    needs = [count + i % 3 if i % 4 else None for i in range(count)]
    clamps: list[Clamp] = [
        (i * 7, code(kinds[i % 3], needs[i]), 2.0 - i, i % 2 > 0) for i in range(count)
    ]
    flags = [ClampFlag.IF_ABOVE, ClampFlag.IF_BELOW, ClampFlag.IF_ABOVE]
    for i, bar, flag in zip(often, bars, flags, strict=True):
        clamps.append((i, code(ClampKind.CONDITION, flags=flag), bar, False))
    return clamps


@pytest.mark.parametrize("tier", [Tier.DELTA, Tier.FULL])
@pytest.mark.parametrize(
    "activation",
    [Activation.JUMPRELU, pytest.param(Activation.TOPK, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("two_streams", [True] if INTERPRETED else [True, False])
def test_a_clamp_acts_only_where_its_condition_holds(
    tier: Tier,
    activation: Activation,
    shape: tuple[int, float],
    dtype: torch.dtype,
    two_streams: bool,
) -> None:
    torch.manual_seed(5)
    d_sae, l0 = shape
    slot = make_slot(
        d_sae, D, activation, k=int(l0), l0=l0, dtype=dtype, max_clamps=16, rows=3
    )
    step = make_step(TOKENS, TOKENS, [1], tier)
    before = make_stream(TOKENS, D, dtype, two_streams)
    x = stream(*before)
    settle(slot, step, tier, x)
    table = slot.full if tier is Tier.FULL else slot.delta
    clamps = conditional_clamps(activations(slot, x))
    set_row(table, 1, clamps)
    with_conditions = compare(slot, tier, step, before)
    free = [(f, int(c) & 255, v, only) for f, c, v, only in clamps]
    set_row(table, 1, free)  # type: ignore[arg-type]
    without = compare(slot, tier, step, before)
    assert (with_conditions != without).any(1).sum() > TOKENS // 4


def test_a_condition_on_a_feature_that_is_silent_holds_below_only() -> None:
    slot = make_slot(64, D, l0=30, dtype=torch.float16, max_clamps=4, rows=3)
    slot.weights.threshold[9] = 1e9
    step = make_step(TOKENS, TOKENS, [1, 2], Tier.DELTA)
    before = make_stream(TOKENS, D, torch.float16)
    settle(slot, step, Tier.DELTA, stream(*before))
    slot.weights.threshold[9] = 1e9
    for row, flag in ((1, ClampFlag.IF_ABOVE), (2, ClampFlag.IF_BELOW)):
        wanted = code(ClampKind.CONDITION, flags=flag)
        clamps = [(3, code(ClampKind.ADDITIVE, 1), 5.0, False), (9, wanted, 0.5, False)]
        set_row(slot.delta, row, clamps)
    moved = compare(slot, Tier.DELTA, step, before).norm(dim=1)
    assert (moved[0::2] < 1e-2).all() and (moved[1::2] > 0.1).all()


ALONG = ClampFlag.PROJECTION
FAR = ClampFlag.PROJECTION | ClampFlag.RELATIVE
VECTORS: dict[str, list[Clamp]] = {
    "set": [(2, code(ClampKind.ABSOLUTE, flags=ALONG), 4.0, False)],
    "ablate": [(2, code(ClampKind.SCALE, flags=ALONG), 0.0, False)],
    "bound": [
        (4, code(ClampKind.ABSOLUTE, flags=ALONG | ClampFlag.IF_BELOW), -0.4, False),
        (4, code(ClampKind.ABSOLUTE, flags=ALONG | ClampFlag.IF_ABOVE), 0.3, False),
    ],
    "relative": [(1, code(ClampKind.ADDITIVE, flags=FAR), 0.5, False)],
    "relative set": [(1, code(ClampKind.ABSOLUTE, flags=FAR), -0.5, False)],
    "of length zero": [(5, code(ClampKind.ABSOLUTE, flags=ALONG), 3.0, False)],
    "beside plain ones": [
        (i, ClampKind.ADDITIVE, 0.3 * i - 1, False) for i in range(6, 15)
    ]
    + [(i, code(ClampKind.SCALE, flags=ALONG), -1.0, False) for i in range(15, 19)],
    "far too much": [(3, code(ClampKind.ABSOLUTE, flags=FAR), 3e38, False)],
}


@pytest.mark.parametrize("clamps", VECTORS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("two_streams", [True] if INTERPRETED else [True, False])
@pytest.mark.parametrize("d_model", [D] if INTERPRETED else [D, 2304, 33])
def test_a_vector_sets_scales_and_bounds_the_projection_on_it(
    clamps: str, dtype: torch.dtype, two_streams: bool, d_model: int
) -> None:
    torch.manual_seed(6)
    slot = VectorSlot(20, d_model, 3, 16, DEVICE)
    slot.directions.copy_(3 * torch.randn(20, d_model))
    slot.directions[5] = 0
    set_row(slot.table, 1, VECTORS[clamps])
    set_row(slot.table, 2, [(0, ClampKind.ADDITIVE, 1.5, False)])
    step = make_step(TOKENS, TOKENS, [1, 0, 2], Tier.ADDITIVE)
    before = make_stream(TOKENS, d_model, dtype, two_streams)
    moved = compare(slot, Tier.ADDITIVE, step, before)
    # Both ways have counted, each for every vector that the row uses.
    wanted = int(slot.saturated.max()) // 2
    used = sorted({feature for feature, *_ in VECTORS[clamps]} if wanted else set())
    assert slot.saturated.nonzero().squeeze(1).tolist() == used
    assert slot.saturated[used].tolist() == [2 * wanted] * len(used)
    if clamps == "far too much":
        assert wanted == TOKENS // 3
        out = run(slot, Tier.ADDITIVE, step, before, "kernel")
        assert out.abs().max() <= STREAM_LIMIT[dtype]
        return
    assert wanted == 0
    assert (moved[0::3].norm(dim=1) > 1e-3).any() == (clamps != "of length zero")


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_ablated_direction_is_gone(dtype: torch.dtype) -> None:
    slot = VectorSlot(4, D, 2, 4, DEVICE)
    slot.directions.copy_(torch.randn(4, D))
    set_row(slot.table, 1, VECTORS["ablate"])
    step = make_step(TOKENS, TOKENS, [1], Tier.ADDITIVE)
    before = make_stream(TOKENS, D, dtype)
    out = run(slot, Tier.ADDITIVE, step, before, "kernel").double()
    u = slot.directions[2].double() / slot.directions[2].double().norm()
    assert (stream(*before).double() @ u).abs().max() > 0.5
    assert (out @ u).abs().max() <= TOLERANCE[dtype] * D**0.5
