# SPDX-License-Identifier: Apache-2.0
"""What csrc/steering/screen.cuh and refine.cuh compute, on a CPU: limbs, facts, codes,
and who may fire.

Directed rounding is modelled by float64 and `round_up`. The model of the encoder adds
in float32 and always rounds towards zero, 17 terms at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from vllm.config.steering_screening import fine_bytes, padded
from vllm.model_executor.layers.steering_kernels.screen import (
    TINY,
    TOKEN_FLUSH,
    quantise,
    round_up,
)

LIMB = 128
MOST_LIMBS = 127 * LIMB + LIMB // 2 - 1


@dataclass
class Copy:
    """The copy of some rows in few bits and their bounds."""

    q: torch.Tensor
    rows: torch.Tensor
    fine: torch.Tensor

    @property
    def c(self) -> torch.Tensor:
        """int64 `[F, columns]`, -3, -1, 1 or 3, unpacked as the kernel does it."""
        n = self.fine.shape[0]
        words = (
            self.fine.view(torch.int32).long().view(n, -1, 4, 4)
        )  # group, lane, word
        nibbles = torch.arange(8) * 4
        found = []
        for operand in range(8):
            word = words[..., operand // 2] >> (operand % 2 * 2) & 0x33333333
            found.append(2 * (word[..., None] >> nibbles & 0xF) - 3)
        # group, operand, lane, half, byte -> group, operand, half, lane, byte
        codes = torch.stack(found, 2).view(n, words.shape[1], 8, 4, 2, 4)
        return codes.transpose(3, 4).reshape(n, -1)


def copy_of(w_enc: torch.Tensor) -> Copy:
    """As an engine makes it."""
    f, d_in = w_enc.shape
    copy = Copy(
        torch.full((f, padded(d_in)), 99, dtype=torch.int8),
        torch.full((f, 4), -1.0),
        torch.full((f, fine_bytes(d_in)), 99, dtype=torch.int8),
    )
    quantise(w_enc, copy.q, copy.rows, copy.fine)
    return copy


@dataclass
class Token:
    """Limbs of a token; `u`; `|x|`, `|d|`, `|x - 128 u h|` and eta, rounded up."""

    high: torch.Tensor
    low: torch.Tensor
    unit: float
    size: float
    rest: float
    tail: float
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
        upper((value - unit * LIMB * high).norm()),
        TOKEN_FLUSH if most else 0.0,
    )


def may_fire(
    copy: Copy, token: Token, cut: torch.Tensor, fine: bool = False
) -> torch.Tensor:
    """bool `[F]`: whose accumulator may be above `cut`, by 8 bits or by 10."""
    d_in = token.high.shape[0]
    q = copy.q[:, :d_in].long()
    assert not copy.q[:, d_in:].any()
    p = LIMB * (q @ token.high.long()) + q @ token.low.long()
    scale, a, b, finer = copy.rows.double().unbind(1)
    zero_row = (a == 0) & (cut >= 0)
    error = a * token.size
    if fine:
        p = p + 16 * (copy.c[:, :d_in] @ token.high.long())
        error = finer * token.size + (a + finer) * token.tail
    bound = scale * token.unit * p + error + b * token.rest + token.eta
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
