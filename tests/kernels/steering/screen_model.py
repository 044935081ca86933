# SPDX-License-Identifier: Apache-2.0
"""What csrc/steering/screen.cuh computes, on a CPU: limbs, facts, and who may fire.

Directed rounding is modelled by float64 and `round_up`. The model of the encoder adds
in float32 and always rounds towards zero, 17 terms at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from vllm.model_executor.layers.steering_kernels.screen import (
    TINY,
    TOKEN_FLUSH,
    padded,
    quantise,
    round_up,
)

LIMB = 128
MOST_LIMBS = 127 * LIMB + LIMB // 2 - 1


@dataclass
class Copy:
    """The 8-bit copy of some rows and their bounds."""

    q: torch.Tensor
    rows: torch.Tensor


def copy_of(w_enc: torch.Tensor) -> Copy:
    """As an engine makes it."""
    f, d_in = w_enc.shape
    copy = Copy(
        torch.full((f, padded(d_in)), 99, dtype=torch.int8), torch.full((f, 4), -1.0)
    )
    quantise(w_enc, copy.q, copy.rows)
    return copy


@dataclass
class Token:
    """Limbs of a token, and `u`, `|x|`, `|d|`, eta, the last three rounded up."""

    high: torch.Tensor
    low: torch.Tensor
    unit: float
    size: float
    rest: float
    eta: float


def upper(exact: float | torch.Tensor) -> float:
    return float(round_up(torch.as_tensor(exact, dtype=torch.float64)))


def split(x: torch.Tensor) -> Token:
    """The limbs of one finite token `[d_in]`."""
    value = x.double()
    most = float(value.abs().max())
    unit = 0.0 if most < TINY else 2.0 ** (int(np.floor(np.log2(most))) - 13)
    whole = torch.zeros_like(value)
    if unit:
        whole = (value / unit).round().clamp(-MOST_LIMBS, MOST_LIMBS)
    high = torch.floor((whole + LIMB // 2) / LIMB)
    low = whole - LIMB * high
    assert high.abs().max() <= 127 and low.abs().max() <= 127
    rest = value - unit * whole
    return Token(
        high.to(torch.int8),
        low.to(torch.int8),
        unit,
        upper(value.norm()),
        upper(rest.norm()),
        TOKEN_FLUSH if most else 0.0,
    )


def may_fire(copy: Copy, token: Token, cut: torch.Tensor) -> torch.Tensor:
    """bool `[F]`: whose accumulator may be above `cut`."""
    d_in = token.high.shape[0]
    q = copy.q[:, :d_in].long()
    assert not copy.q[:, d_in:].any()
    p = LIMB * (q @ token.high.long()) + q @ token.low.long()
    scale, a, b, _ = copy.rows.double().unbind(1)
    bound = scale * token.unit * p + a * token.size + b * token.rest + token.eta
    zero_row = (a == 0) & (cut >= 0)
    return ~(round_up(bound) <= cut) & ~zero_row


def towards_zero(exact: np.ndarray) -> np.ndarray:
    """float64 to float32, cut off."""
    near = exact.astype(np.float32)
    beyond = np.abs(near.astype(np.float64)) > np.abs(exact)
    return np.where(beyond, np.nextafter(near, np.float32(0)), near)


def accumulate(w_enc: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The encoder's float32 sums `[F]`: 16 products a step.

    Every term loses what lies 2^24 below the largest, and the sum is cut off.
    """
    products = w_enc.double().numpy() * x.double().numpy()
    f, d_in = products.shape
    products = np.pad(products, ((0, 0), (0, -d_in % 64)))
    total = np.zeros(f, np.float32)
    for first in range(0, products.shape[1], 16):
        terms = products[:, first : first + 16]
        terms = np.concatenate([total.astype(np.float64)[:, None], terms], 1)
        largest = np.abs(terms).max(1, keepdims=True)
        unit = np.exp2(np.floor(np.log2(np.maximum(largest, 2.0**-126))) - 23)
        total = towards_zero((np.trunc(terms / unit) * unit).sum(1))
    return torch.from_numpy(total)
