# SPDX-License-Identifier: Apache-2.0
"""The 8-bit copy of `W_enc` with which wide SAEs are screened, and its error bounds.

    w = s q + r,   A = |r| + gamma |w| + tiny,   B = |s q|

The encoder's accumulator for a token `x = u (128 h + l) + d` is then at most
`s u (128 q.h + q.l) + A |x| + B |d| + eta`. A feature can fire only if that passes its
bar. docs/design/screening.md has the proof; csrc/steering/screen.cuh evaluates it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from vllm.config.steering_screening import padded

from .plan import cdiv

SCREEN_ORDERS = 128  # the most orders in which the encoder adds up a feature's sum
SCREEN_TOKENS = 64  # the most active tokens of a step that is screened
ENCODER_COLUMNS = 64  # of one stage of the encoder
ORDER_STEP = 7  # pairs of tiles begin their sums so many stages apart
ENCODER_FEATURES = 256  # of two tiles, which have one order of columns
MOST = 127  # the largest |q|
# Rows and tokens beyond these exponents of two have no integers: what is too small is
# all error, what is too large may always fire.
TINY, HUGE = 2.0**-40, 2.0**60
# Errors of what the tensor cores may round to zero (less than 2^-126 a product).
ROW_FLUSH, TOKEN_FLUSH = 2.0**-90, 2.0**-100
SCALES = (1.0, 0.85, 0.7, 0.55)  # of the largest component, tried for each row
CHUNK = 2048  # rows that are quantised at a time


def orders(d_in: int) -> int:
    """In how many orders of columns the encoder adds up the sums of its features."""
    stages = cdiv(d_in, ENCODER_COLUMNS)
    return stages // math.gcd(stages, ORDER_STEP)


def accumulation_error(d_in: int) -> float:
    """gamma: the encoder's sum differs from the exact one by at most gamma |w| |x|.

    A step of the tensor cores adds 16 products to the accumulator. Each of the 17 terms
    and the result lose less than 2^-23 of the largest one.
    """
    steps = cdiv(d_in, ENCODER_COLUMNS) * (ENCODER_COLUMNS // 16)
    lost = steps * 18 * 2.0**-23
    return lost / (1 - lost)


def round_up(exact: torch.Tensor) -> torch.Tensor:
    """float64 to the nearest float32 that is not smaller, with 2^-40 to spare."""
    exact = exact * (1 + 2.0**-40)
    near = exact.float()
    above = torch.nextafter(near, torch.full_like(near, float("inf")))
    return torch.where(near.double() < exact, above, near)


def _integers(w: torch.Tensor, largest: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Scale, integers and |r|^2 of rows, with the best of `SCALES`."""
    best_scale = torch.zeros_like(largest, dtype=torch.float32)
    best_q = torch.zeros_like(w, dtype=torch.int8)
    best = (w * w).sum(1)
    for share in SCALES:
        scale = (largest * (share / MOST)).float()
        step = torch.where(scale > 0, scale, 1).double()[:, None]
        q = (w / step).round().clamp(-MOST, MOST)
        rest = w - step * q
        error = (rest * rest).sum(1)
        better = (error < best) & (scale > 0)
        best = torch.where(better, error, best)
        best_scale = torch.where(better, scale, best_scale)
        best_q = torch.where(better[:, None], q.to(torch.int8), best_q)
    return best_scale, best_q, best


def quantise(w_enc: torch.Tensor, q: torch.Tensor, rows: torch.Tensor) -> None:
    """Fill the copy and its bounds, in place.

    Args:
        w_enc: `[F, d_in]`, bfloat16 or float16.
        q: int8 `[F, padded(d_in)]`.
        rows: float32 `[F, 4]`, filled with `s`, `A`, `B` and 0.
    """
    d_in = w_enc.shape[1]
    gamma = accumulation_error(d_in)
    q.zero_()
    for first in range(0, w_enc.shape[0], CHUNK):
        part = slice(first, first + CHUNK)
        w = w_enc[part].double()
        largest = w.abs().amax(1)
        usable = (largest >= TINY) & (largest < HUGE)
        known = largest < HUGE  # not where the row holds NaN
        w = torch.where(known[:, None], w, 0)
        scale, integers, rest = _integers(w, torch.where(usable, largest, 0))
        norm = w.square().sum(1).sqrt()
        error = rest.sqrt() + gamma * norm + ROW_FLUSH
        error = torch.where(largest == 0, 0, error)
        error = torch.where(known, error, float("inf"))
        size = integers.double().square().sum(1).sqrt() * scale.double()
        q[part, :d_in] = integers
        rows[part, 0] = scale
        rows[part, 1] = round_up(error)
        rows[part, 2] = round_up(size)
        rows[part, 3] = 0


class ScreenCopy(nn.Module):
    """The 8-bit copy of an SAE's `W_enc`.

    Attributes:
        q: int8 `[F, padded(d_in)]`.
        rows: float32 `[F, 4]`, `s`, `A`, `B` and 0.
        state: int32 `[4]`, per width of a step (at most 8, 32 or 64 tokens) how many
            steps go unscreened, because too many features were candidates.
    """

    q: torch.Tensor
    rows: torch.Tensor
    state: torch.Tensor

    def __init__(self, features: int, d_in: int, device: torch.device) -> None:
        super().__init__()
        q = torch.zeros(features, padded(d_in), dtype=torch.int8, device=device)
        rows = torch.zeros(features, 4, device=device)
        state = torch.zeros(4, dtype=torch.int32, device=device)
        for name, tensor in (("q", q), ("rows", rows), ("state", state)):
            self.register_buffer(name, tensor, persistent=False)

    def fill(self, w_enc: torch.Tensor) -> None:
        """Copy `W_enc`, in place."""
        quantise(w_enc, self.q, self.rows)
        self.state.zero_()


class ScreenScratch:
    """What a screened step passes from block to block; shared by all sites.

    Args:
        widths: features and `d_in` of every screened encoder.
        device: where it lives.
    """

    def __init__(self, widths: Iterable[tuple[int, int]], device: torch.device) -> None:
        widths = list(widths)
        columns = max((padded(d_in) for _, d_in in widths), default=0)
        found = max((candidates(*each) for each in widths), default=0)
        tokens = 2 * SCREEN_TOKENS
        i32 = torch.int32
        self._limbs = torch.zeros(tokens * columns, dtype=torch.int8, device=device)
        self._facts = torch.zeros(SCREEN_TOKENS, 4, device=device)
        self._candidates = torch.zeros(found, dtype=i32, device=device)
        self._counts = torch.zeros(SCREEN_ORDERS, dtype=i32, device=device)

    @property
    def nbytes(self) -> int:
        """Device bytes held."""
        own = (self._limbs, self._facts, self._candidates, self._counts)
        return sum(tensor.nbytes for tensor in own)

    def bundle(self, copy: ScreenCopy) -> list[torch.Tensor]:
        """The tensors of `SCREEN_FIELDS`."""
        columns = copy.q.shape[1]
        limbs = self._limbs[: 2 * SCREEN_TOKENS * columns].view(-1, columns)
        own = [copy.q, copy.rows, copy.state]
        return [*own, limbs, self._facts, self._candidates, self._counts]


SCREEN_FIELDS = (
    "screen_w", "screen_rows", "screen_state", "screen_limbs", "screen_facts",
    "screen_candidates", "screen_counts",
)  # fmt: skip


def candidates(features: int, d_in: int) -> int:
    """Ints of a list of all features, in which each order has a place of its own."""
    pairs = cdiv(features, ENCODER_FEATURES)
    return cdiv(pairs, orders(d_in)) * ENCODER_FEATURES * orders(d_in)
