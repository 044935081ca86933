# SPDX-License-Identifier: Apache-2.0
"""The mathematics of the three tiers in float64, and random sites to try it on."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
import torch

from vllm.config.steering import Activation, SiteInfo, Tier
from vllm.config.steering_points import HookPoint
from vllm.model_executor.layers.steering_clamp_table import ClampTable
from vllm.model_executor.layers.steering_state import (
    ONLY_IF_ACTIVE,
    ClampKind,
    MetaField,
    SAESlot,
    SAEWeights,
    StepState,
    VectorSlot,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
# The interpreter multiplies bfloat16 operands as if they were integers.
DTYPE = torch.float16 if INTERPRETED else torch.bfloat16
needs_gpu = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="needs a CUDA device"
)

Clamp = tuple[int, ClampKind, float, bool]


@dataclass
class Case:
    """One site, one step, and the stream that enters it."""

    slot: SAESlot
    step: StepState
    hidden: torch.Tensor
    residual: torch.Tensor | None


def threshold_for(l0: float, d_sae: int) -> float:
    """The threshold that l0 of d_sae standard normal scores pass on average."""
    share = torch.tensor(1 - l0 / d_sae, dtype=torch.float64)
    return float(torch.special.ndtri(share))


def make_slot(
    d_sae: int,
    d_model: int,
    activation: Activation = Activation.JUMPRELU,
    k: int = 8,
    l0: float = 12.0,
    dtype: torch.dtype = DTYPE,
    capacity: int | None = None,
    topk_relu: bool = True,
    skip_mask: int = 0,
    norm_limit: float | None = None,
    rows: int = 9,
    max_clamps: int = 8,
    activations: frozenset[Activation] | None = None,
) -> SAESlot:
    """A random SAE whose scores are standard normal for a standard normal stream."""
    weights = SAEWeights(capacity or d_sae, d_model, dtype, DEVICE)
    slot = SAESlot(weights, rows, max_clamps, activations or frozenset({activation}))
    fill_slot(slot, d_sae, activation, k, l0, topk_relu, skip_mask, norm_limit)
    return slot


def fill_slot(
    slot: SAESlot,
    d_sae: int,
    activation: Activation,
    k: int = 8,
    l0: float = 12.0,
    topk_relu: bool = True,
    skip_mask: int = 0,
    norm_limit: float | None = None,
) -> None:
    """Put a new random SAE into an existing slot: same addresses, other values."""
    w = slot.weights
    w.clear()
    d_model = w.d_in
    generator = torch.Generator(DEVICE).manual_seed(int(torch.randint(1 << 30, ())))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=DEVICE, generator=generator)

    w.W_enc[:d_sae] = normal(d_sae, d_model) / d_model**0.5
    w.W_dec[:d_sae] = normal(d_sae, d_model) / d_model**0.5
    w.b_enc[:d_sae] = 0.05 * normal(d_sae)
    w.b_dec.copy_(0.5 * normal(d_model))
    bar = 0.0 if activation is Activation.RELU else threshold_for(l0, d_sae)
    w.threshold[:d_sae] = bar
    site = SiteInfo(
        0, HookPoint.POST_BLOCK, d_model, d_sae, activation,
        k if activation is Activation.TOPK else None, topk_relu,
    )  # fmt: skip
    w.set_meta(site, skip_mask, norm_limit)


def set_row(table: ClampTable, row: int, clamps: list[Clamp]) -> None:
    """Make `row` steer with `clamps`."""
    packed = torch.zeros(1, table.packed.shape[1], dtype=torch.int32)
    host = ClampTable(1, table.max_clamps, torch.device("cpu"))
    host.packed.copy_(packed)
    host.active[0] = 1
    host.count[0] = len(clamps)
    for i, (feature, kind, value, only_if_active) in enumerate(clamps):
        host.feature[0, i] = feature
        host.code[0, i] = int(kind) + (ONLY_IF_ACTIVE if only_if_active else 0)
        host.value[0, i] = value
    table.packed[row].copy_(host.packed[0])


def random_clamps(d_sae: int, count: int) -> list[Clamp]:
    """Distinct features with every kind of clamp, half of them conditional."""
    features = torch.randperm(d_sae)[:count].tolist()
    kinds = list(ClampKind)
    return [
        (f, kinds[i % 3], float(torch.randn(()) * 4), bool(i % 2))
        for i, f in enumerate(features)
    ]


def make_stream(
    tokens: int, d_model: int, dtype: torch.dtype, two_streams: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A standard normal residual stream, split in two unless told otherwise."""
    scale = 0.5**0.5 if two_streams else 1.0
    hidden = (scale * torch.randn(tokens, d_model, device=DEVICE)).to(dtype)
    if not two_streams:
        return hidden, None
    return hidden, (scale * torch.randn(tokens, d_model, device=DEVICE)).to(dtype)


def make_step(tokens: int, max_tokens: int, rows: list[int], tier: Tier) -> StepState:
    """A step whose first `tokens` tokens have `rows` (cycled) in `tier`."""
    step = StepState(max_tokens, DEVICE)
    cycle = torch.tensor(rows, dtype=torch.int32).repeat(tokens // len(rows) + 1)
    step.index[tier, :tokens] = cycle[:tokens].to(DEVICE)
    return step


def stream(hidden: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    """x as the model computes it: the sum, rounded to the model's dtype."""
    return hidden if residual is None else hidden + residual


def scores(slot: SAESlot, x: torch.Tensor) -> torch.Tensor:
    """Pre-activations in float64, [T, F]."""
    w = slot.weights
    return x.double() @ w.W_enc.double().T + w.b_enc.double()


def activations(slot: SAESlot, x: torch.Tensor) -> torch.Tensor:
    """Feature activations in float64, [T, F]."""
    w = slot.weights
    meta = w.meta.tolist()
    p = scores(slot, x)
    if not meta[MetaField.USES_TOPK]:
        bar = w.threshold.double().clamp(min=0)
        return torch.where(p > bar, p, torch.zeros_like(p))
    p[:, meta[MetaField.D_SAE] :] = float("-inf")
    # A stable sort keeps equal scores in index order.
    order = torch.sort(p, dim=1, descending=True, stable=True).indices
    chosen = order[:, : meta[MetaField.K]]
    f = torch.zeros_like(p).scatter_(1, chosen, p.gather(1, chosen))
    return f.clamp(min=0) if meta[MetaField.TOPK_RELU] else f


CLOSE = 1e-4  # scores nearer than this may order differently in float32


def settle(slot: SAESlot, step: StepState, tier: Tier, x: torch.Tensor) -> None:
    """Move the case away from ties that float32 and float64 may break differently.

    Thresholds go to the middle of the gap between the scores around them. TopK tokens
    whose k-th and next scores are close (but not equal) give up their row.
    """
    w = slot.weights
    meta = w.meta.tolist()
    d_sae, k = meta[MetaField.D_SAE], meta[MetaField.K]
    if x.shape[0] == 0:
        return
    p = scores(slot, x)[:, :d_sae]
    if meta[MetaField.USES_TOPK]:
        if k < d_sae:
            top = torch.topk(p, k + 1, dim=1).values
            gap = top[:, -2] - top[:, -1]
            step.index[tier, : x.shape[0]][(gap < CLOSE) & (gap > 0)] = 0
        return
    bar = w.threshold[:d_sae].double()
    inf = torch.full_like(p, float("inf"))
    above = torch.where(p > bar, p, inf).min(0).values.clamp(max=bar.max() + 1)
    below = torch.where(p > bar, -inf, p).max(0).values.clamp(min=bar.min() - 1)
    middle = ((above + below) / 2).float()
    w.threshold[:d_sae] = torch.where(bar > 0, middle.clamp(min=1e-3), bar.float())


def clamp_deltas(table: ClampTable, row: int, f: torch.Tensor) -> torch.Tensor:
    """`g - f` of every feature for one token whose activations are `f` [F]."""
    delta = torch.zeros_like(f)
    for i in range(int(table.count[row])):
        feature = int(table.feature[row, i])
        code, value = int(table.code[row, i]), float(table.value[row, i])
        now = float(f[feature])
        if code >= ONLY_IF_ACTIVE and now == 0.0:
            continue
        kind = ClampKind(code % ONLY_IF_ACTIVE)
        goal = {
            ClampKind.ABSOLUTE: value,
            ClampKind.ADDITIVE: now + value,
            ClampKind.SCALE: now * value,
        }[kind]
        delta[feature] = goal - now
    return delta


def active_tokens(
    table: ClampTable,
    tier: Tier,
    step: StepState,
    slot: SAESlot | None,
    x: torch.Tensor,
) -> list[int]:
    """Tokens that the tier edits at this slot."""
    found = []
    for t in range(x.shape[0]):
        on = bool(table.active[int(step.index[tier, t])])
        if on and slot is not None:
            skip = int(slot.weights.meta[MetaField.SKIP_MASK])
            norm = float(x[t].double().norm())
            on = not (int(step.flags[t]) & skip)
            on = on and norm <= float(slot.weights.norm_limit)
        if on:
            found.append(t)
    return found


def expected(
    slot: SAESlot | VectorSlot,
    tier: Tier,
    step: StepState,
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
) -> dict[int, torch.Tensor]:
    """float64 x' of every token that the tier edits."""
    x = stream(hidden, residual)
    if isinstance(slot, VectorSlot):
        table, sae, directions = slot.table, None, slot.directions
    else:
        table = slot.full if tier is Tier.FULL else slot.delta
        sae, directions = slot, slot.weights.W_dec
    tokens = active_tokens(table, tier, step, sae, x)
    if not tokens:
        return {}
    if sae is None:
        f = torch.zeros(len(tokens), directions.shape[0], device=DEVICE).double()
    else:
        f = activations(sae, x[tokens])
    out = {}
    for i, t in enumerate(tokens):
        weight = clamp_deltas(table, int(step.index[tier, t]), f[i])
        base = x[t].double()
        if tier is Tier.FULL:
            assert sae is not None
            base, weight = sae.weights.b_dec.double(), weight + f[i]
        out[t] = base + weight @ directions.double()
    return out


TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 1e-5}


def check(
    want: dict[int, torch.Tensor],
    before: tuple[torch.Tensor, torch.Tensor | None],
    after: tuple[torch.Tensor, torch.Tensor | None],
) -> None:
    """Edited tokens equal `want` up to one rounding; the others' bits are unchanged."""
    old_hidden, old_residual = before
    hidden, residual = after
    edited = torch.zeros(hidden.shape[0], dtype=torch.bool, device=DEVICE)
    edited[list(want)] = True
    assert torch.equal(hidden[~edited], old_hidden[~edited])
    out = hidden
    if residual is not None and old_residual is not None:
        assert torch.equal(residual[~edited], old_residual[~edited])
        assert not hidden[edited].any()
        out = residual
    for t, value in want.items():
        error = (out[t].double() - value).norm() / value.norm()
        assert error <= TOLERANCE[hidden.dtype], f"token {t}: error {float(error):.2e}"
