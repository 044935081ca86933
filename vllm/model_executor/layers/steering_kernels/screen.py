# SPDX-License-Identifier: Apache-2.0
"""The copy of `W_enc` in few bits with which wide SAEs are screened, and its bounds.

    w = s q + r = s q + s c / 8 + r2,   q of 8 bits, c of 2
    A = |r| + gamma |w| + tiny,   B = |s q|,   A2 = |r2| + gamma |w| + tiny

The encoder's accumulator for a token `x = u (128 h + l) + d`, `e = u l + d`, is at most

    s u (128 q.h + q.l) + A |x| + B |d| + eta                             (8 bits)
    s u (128 q.h + q.l + 16 c.h) + A2 |x| + B |d| + (A + A2) |e| + eta    (10 bits)

A feature can fire only if both pass its bar. docs/design/screening.md has the proof;
csrc/steering/screen.cuh and refine.cuh evaluate it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from vllm.config.steering_screening import (
    FINE_COLUMNS,
    fine_bytes,
    most_tokens,
    padded,
)

from .plan import cdiv

STATE_MOST = 3
SCREEN_TOKENS = 64  # the most active tokens of a step that is screened
ENCODER_COLUMNS = 64  # of one stage of the encoder
ENCODER_FEATURES = 256  # of two tiles, which have one order of columns
MOST = 127  # the largest |q|
FINE_STEPS = 8  # s / FINE_STEPS is the unit of c
MOST_FINE = 3  # c is -3, -1, 1 or 3
# Rows and tokens beyond these exponents of two have no integers: what is too small is
# all error, what is too large may always fire.
TINY, HUGE = 2.0**-40, 2.0**60
# Errors of what the tensor cores may round to zero (less than 2^-126 a product).
ROW_FLUSH, TOKEN_FLUSH = 2.0**-90, 2.0**-100
SCALES = (1.0, 0.85, 0.7, 0.55)  # of the largest component, tried for each row
CHUNK = 2048  # rows that are quantised at a time


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


def _fine(rest: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Codes 0 .. 3 for c = -3, -1, 1, 3, and |r2|^2, of what 8 bits leave."""
    unit = scale.double()[:, None] / FINE_STEPS
    step = torch.where(unit > 0, unit, 1)
    codes = ((rest / step + MOST_FINE) / 2).round().clamp(0, MOST_FINE)
    left = rest - unit * (2 * codes - MOST_FINE)
    return codes.to(torch.uint8), left.square().sum(1)


def pack_codes(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes `[n, d_in]` to uint8 `[n, fine_bytes(d_in)]`.

    In each group of 256 columns a lane of a quarter of a warp has 16 bytes: the codes
    of its elements of eight operands of the tensor cores (32 columns each), four bytes
    for two operands, of which the second has the upper halves of the nibbles.
    """
    n, d_in = codes.shape
    codes = nn.functional.pad(codes, (0, -d_in % FINE_COLUMNS))
    # column = 64 word + 32 operand + 16 half + 4 lane + 2 byte + nibble
    parts = codes.view(n, -1, 4, 2, 2, 4, 2, 2).permute(0, 1, 5, 2, 4, 6, 7, 3)
    shifts = torch.tensor([[0, 2], [4, 6]], dtype=torch.uint8, device=codes.device)
    return (parts << shifts).sum((-1, -2), dtype=torch.uint8).reshape(n, -1)


def quantise(
    w_enc: torch.Tensor, q: torch.Tensor, rows: torch.Tensor, fine: torch.Tensor
) -> None:
    """Fill the copy and its bounds, in place.

    Args:
        w_enc: `[F, d_in]`, bfloat16 or float16.
        q: int8 `[F, padded(d_in)]`.
        rows: float32 `[F, 4]`, filled with `s`, `A`, `B` and `A2`.
        fine: int8 `[F, fine_bytes(d_in)]`, filled with the codes of `c`.
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
        left = w - scale.double()[:, None] * integers.double()
        codes, finer = _fine(left, scale)
        norm = w.square().sum(1).sqrt()
        size = integers.double().square().sum(1).sqrt() * scale.double()
        q[part, :d_in] = integers
        fine[part] = pack_codes(codes).view(torch.int8)
        rows[part, 0] = scale
        rows[part, 2] = round_up(size)
        for column, square in ((1, rest), (3, finer)):
            error = square.sqrt() + gamma * norm + ROW_FLUSH
            error = torch.where(largest == 0, 0, error)
            rows[part, column] = round_up(torch.where(known, error, float("inf")))


class ScreenCopy(nn.Module):
    """The copy of an SAE's `W_enc` in few bits.

    Attributes:
        q: int8 `[F, padded(d_in)]`.
        rows: float32 `[F, 4]`, `s`, `A`, `B` and `A2`.
        fine: int8 `[F, fine_bytes(d_in)]`, two more bits of each element.
        state: int32 `[4]`, per width of a step (at most 8, 32 or 64 tokens) how many
            steps go unscreened, because too many features were candidates; and the
            most tokens of a step that is screened (`STATE_MOST`).
    """

    q: torch.Tensor
    rows: torch.Tensor
    fine: torch.Tensor
    state: torch.Tensor

    def __init__(self, features: int, d_in: int, device: torch.device) -> None:
        super().__init__()
        q = torch.zeros(features, padded(d_in), dtype=torch.int8, device=device)
        rows = torch.zeros(features, 4, device=device)
        fine = torch.zeros(features, fine_bytes(d_in), dtype=torch.int8, device=device)
        state = torch.zeros(4, dtype=torch.int32, device=device)
        state[STATE_MOST] = most_tokens(features, d_in)
        own = {"q": q, "rows": rows, "fine": fine, "state": state}
        for name, tensor in own.items():
            self.register_buffer(name, tensor, persistent=False)

    def fill(self, w_enc: torch.Tensor) -> None:
        """Copy `W_enc`, in place."""
        quantise(w_enc, self.q, self.rows, self.fine)
        self.state[:STATE_MOST].zero_()


class ScreenScratch:
    """What a screened step passes from block to block; shared by all sites.

    Args:
        widths: features and `d_in` of every screened encoder.
        device: where it lives.

    Attributes:
        facts: float32 `[80, 4]`, what bounds need to know of the tokens of the step
            that was screened last; zeros before.
    """

    def __init__(self, widths: Iterable[tuple[int, int]], device: torch.device) -> None:
        widths = list(widths)
        columns = max((padded(d_in) for _, d_in in widths), default=0)
        room = max((candidates(features) for features, _ in widths), default=0)
        tokens, i32 = SCREEN_TOKENS, torch.int32
        self._limbs = torch.zeros(2 * tokens * columns, dtype=torch.int8, device=device)
        self.facts = torch.zeros(tokens + tokens // 4, 4, device=device)
        self._candidates = torch.zeros(2 * room, dtype=i32, device=device)
        self._counts = torch.zeros(4, dtype=i32, device=device)
        self._sums = torch.zeros(room * tokens, device=device)

    def _own(self) -> list[torch.Tensor]:
        return [self._limbs, self.facts, self._candidates, self._counts, self._sums]

    @property
    def nbytes(self) -> int:
        """Device bytes held."""
        return sum(tensor.nbytes for tensor in self._own())

    def bundle(self, copy: ScreenCopy) -> list[torch.Tensor]:
        """The tensors of `SCREEN_FIELDS`."""
        columns = copy.q.shape[1]
        limbs = self._limbs[: 2 * SCREEN_TOKENS * columns].view(-1, columns)
        return [copy.q, copy.rows, copy.state, copy.fine, limbs, *self._own()[1:]]


SCREEN_FIELDS = (
    "screen_w", "screen_rows", "screen_state", "screen_fine", "screen_limbs",
    "screen_facts", "screen_candidates", "screen_counts", "screen_sums",
)  # fmt: skip


def candidates(features: int) -> int:
    """Ints of a list of all features: whole pairs of tiles."""
    return cdiv(features, ENCODER_FEATURES) * ENCODER_FEATURES
