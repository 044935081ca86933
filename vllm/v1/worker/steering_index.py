# SPDX-License-Identifier: Apache-2.0
"""From the batch's spans to the row of every token.

The phase of a token is decided by its position alone, so chunking, preemption,
recompute, draft tokens and prefix-cache hits cannot change it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class BatchView:
    """What steering needs of a step; each runner builds it from its own batch.

    Attributes:
        req_ids: requests in batch order; their tokens follow one another.
        num_scheduled: `[n]` tokens of each request in this step.
        num_computed: `[n]` position of each request's first token in this step.
        prompt_len: `[n]` number of prompt tokens.
        token_ids: device tensor `[>= sum(num_scheduled)]`, ids of the step's tokens.
    """

    req_ids: list[str]
    num_scheduled: np.ndarray
    num_computed: np.ndarray
    prompt_len: np.ndarray
    token_ids: torch.Tensor


# After every position.
NO_STOP = 1 << 40

Rows = tuple[int, ...]
# Tokens that follow one another and have the same rows: their rows [tier, runs],
# whether they are of the prompt [runs], and how many there are [runs].
Runs = tuple[np.ndarray, np.ndarray, np.ndarray]
# So many requests that enter another piece are moved one by one.
FEW = 16


@dataclass(frozen=True)
class RequestRows:
    """The rows that one request holds: `[tier]`, 0 where a tier does nothing.

    Attributes:
        prefill, decode: rows of the prompt's tokens, and of all others.
        schedule: of a request with spans, instead of these: where each piece stops,
            counted from the end of the prompt (negative: within it), and its rows.
            One piece stops at 0, the last one at `NO_STOP`.
    """

    prefill: Rows
    decode: Rows
    schedule: tuple[tuple[int, Rows], ...] = ()

    @property
    def pieces(self) -> tuple[tuple[int, Rows], ...]:
        """The schedule, of phases too."""
        return self.schedule or ((0, self.prefill), (NO_STOP, self.decode))

    def held(self, tier: int) -> list[int]:
        """The tier's row of each piece."""
        return [rows[tier] for _, rows in self.pieces]


def piece_counts(first: np.ndarray, last: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """`[n, W]` tokens of each request in each of its pieces.

    Args:
        first, last: `[n]` the request's positions, `last` left out.
        stops: `[n, W]` where the pieces stop; all count from the end of the prompt.
    """
    bounds = np.concatenate([first[:, None], stops], axis=1)
    np.clip(bounds, first[:, None], last[:, None], out=bounds)
    return np.diff(bounds, axis=1)


class StepIndex:
    """The rows of a step's tokens, made anew only where something has changed.

    While the same requests go on within their pieces, a step costs two comparisons of
    `[n]`. When some of them enter another piece, only their tokens get new rows; when
    the batch or its layout changes, all do.

    Attributes:
        rows: int32 `[tier, tokens]`, the row of every token; None if all are 0.
        steered: int64 `[tier, phase]`, tokens of the step that have a row (prefill,
            decode).
        runs: the same tokens as `rows`; another object whenever it has changed.
    """

    def __init__(self, num_tiers: int):
        self.num_tiers = num_tiers
        self.rows: np.ndarray | None = None
        self.steered: np.ndarray = np.zeros((num_tiers, 2), dtype=np.int64)
        self.runs: Runs | None = None
        # [slot, piece, tier]: a slot for each request that holds rows, 0 for others.
        # Phases are two pieces; the width grows with the first request that has more.
        self._slots: np.ndarray = np.zeros((8, 2, num_tiers), dtype=np.int32)
        # [slot, piece]: where it stops, and begins, counted from the prompt's end.
        self._stops: np.ndarray = _phase_stops(8, 2)
        self._starts: np.ndarray = _starts_of(self._stops)
        none = (0,) * num_tiers
        self._pieces = [RequestRows(none, none).pieces] * 8
        self._slot_of: dict[str, int] = {}
        self._free = list(range(7, 0, -1))
        # Of the step before: its requests, the slot of each, and its tokens' rows.
        self._req_ids: list[str] | None = None
        self._batch: np.ndarray = np.zeros(0, dtype=np.int64)
        self._scheduled: np.ndarray = np.zeros(0, dtype=np.int64)
        self._laid: np.ndarray = np.zeros((num_tiers, 0), dtype=np.int32)
        self._one_each = False  # whether each request had one token
        # Of each request: it keeps its rows while `0 <= computed - base <= room`; and
        # whether its first token is of the prompt.
        self._base: np.ndarray = np.zeros(0, dtype=np.int64)
        self._room: np.ndarray = np.zeros(0, dtype=np.uint64)
        self._in_prompt: np.ndarray = np.zeros(0, dtype=bool)

    @property
    def holders(self) -> set[str]:
        """Requests that hold rows."""
        return set(self._slot_of)

    @property
    def width(self) -> int:
        """Pieces that a slot can hold."""
        return self._slots.shape[1]

    def hold(self, req_id: str, rows: RequestRows) -> None:
        """From now on the request has these rows."""
        pieces = rows.pieces
        size = len(self._slots)
        if len(pieces) > self.width:
            more = len(pieces) - self.width
            self._slots = np.pad(self._slots, ((0, 0), (0, more), (0, 0)))
            never: np.ndarray = np.full((size, more), NO_STOP, dtype=np.int64)
            self._stops = np.concatenate([self._stops, never], axis=1)
            self._starts = _starts_of(self._stops)
        if not self._free:
            self._slots = np.concatenate([self._slots, np.zeros_like(self._slots)])
            stops = _phase_stops(size, self.width)
            self._stops = np.concatenate([self._stops, stops])
            self._starts = _starts_of(self._stops)
            self._pieces += self._pieces[:1] * size
            self._free = list(range(2 * size - 1, size - 1, -1))
        slot = self._slot_of[req_id] = self._free.pop()
        n = len(pieces)
        self._pieces[slot] = pieces
        self._slots[slot, :n] = [held for _, held in pieces]
        self._slots[slot, n:] = 0
        self._stops[slot, :n] = [stop for stop, _ in pieces]
        self._stops[slot, n:] = NO_STOP
        self._starts[slot, 1:] = self._stops[slot, :-1]
        self._req_ids = None

    def drop(self, req_id: str) -> None:
        """The request holds no rows any more."""
        self._free.append(self._slot_of.pop(req_id))
        self._req_ids = None

    def update(self, view: BatchView) -> bool:
        """Follow a step; whether `rows` may have changed."""
        n = len(view.req_ids)
        scheduled, computed = view.num_scheduled[:n], view.num_computed[:n]
        same_batch = view.req_ids == self._req_ids
        if not same_batch:
            slots = [self._slot_of.get(req_id, 0) for req_id in view.req_ids]
            self._batch = np.array(slots, dtype=np.int64)
            self._req_ids = list(view.req_ids)
        elif np.array_equal(scheduled, self._scheduled):
            # A position before the piece wraps around, beyond any room.
            left = (computed - self._base).view(np.uint64) > self._room
            moved = left.nonzero()[0]
            if not len(moved):
                return False
            if self._one_each and len(moved) <= FEW:
                self._enter_pieces(view, moved.tolist())
                return True
        self._scheduled = scheduled.astype(np.int64)
        self._one_each = bool((scheduled == 1).all())
        self._lay_out(view)
        return True

    def _enter_pieces(self, view: BatchView, moved: Sequence[int]) -> None:
        """Give these few requests, of one token each, the rows of their new piece.

        A loop: for a handful of requests it is faster than arrays.
        """
        for at in moved:
            prompt_len = int(view.prompt_len[at])
            position = int(view.num_computed[at]) - prompt_len
            start, stop, rows = _piece_at(self._pieces[self._batch[at]], position)
            column = self._laid[:, at]
            was, now = [row != 0 for row in column.tolist()], [row != 0 for row in rows]
            phase, before = int(position >= 0), int(not self._in_prompt[at])
            if (was, before) != (now, phase):
                self.steered[:, before] -= was
                self.steered[:, phase] += now
            column[:] = rows
            self._base[at] = start + prompt_len
            self._room[at] = stop - start - 1
            self._in_prompt[at] = position < 0
        self.rows = self._laid if self.steered.any() else None
        self.runs = self._laid.copy(), self._in_prompt.copy(), self._scheduled

    def _lay_out(self, view: BatchView) -> None:
        """The rows of every token of a step."""
        n, scheduled = len(view.req_ids), self._scheduled
        computed: np.ndarray = view.num_computed[:n].astype(np.int64)
        prompt_len = view.prompt_len[:n]
        first = computed - prompt_len
        stops = self._stops[self._batch]
        pieces = (first[:, None] >= stops).sum(axis=1)
        starts = self._starts[self._batch, pieces]
        base = starts + prompt_len
        room = self._stops[self._batch, pieces] - starts - scheduled
        self._in_prompt = first < 0
        crosses = computed - base > room
        if not crosses.any():
            self._base, self._room = base, room.view(np.uint64)
            rows = self._slots[self._batch, pieces].T
            self._laid = np.repeat(rows, scheduled, axis=1)
            self._count(rows, self._in_prompt, scheduled)
            return
        # A request that goes on into another piece keeps its rows only where it is.
        self._base = np.where(crosses, computed, base)
        self._room = np.where(crosses, 0, room).view(np.uint64)
        self._lay_out_runs(crosses, pieces, first, stops)

    def _lay_out_runs(
        self,
        crosses: np.ndarray,
        pieces: np.ndarray,
        first: np.ndarray,
        stops: np.ndarray,
    ) -> None:
        """As `_lay_out`, with one run of tokens for each piece of those that cross."""
        width = self.width
        runs = np.where(crosses, width, 1)
        starts = np.cumsum(runs) - runs
        lengths: np.ndarray = np.repeat(self._scheduled, runs)
        piece: np.ndarray = np.repeat(pieces, runs)
        in_prompt: np.ndarray = np.repeat(self._in_prompt, runs)
        where = (starts[crosses][:, None] + np.arange(width)).reshape(-1)
        begin = first[crosses]
        counts = piece_counts(begin, begin + self._scheduled[crosses], stops[crosses])
        lengths[where] = counts.reshape(-1)
        piece[where] = np.tile(np.arange(width), len(begin))
        in_prompt[where] = (stops[crosses] <= 0).reshape(-1)
        rows = self._slots[np.repeat(self._batch, runs), piece].T
        self._laid = np.repeat(rows, lengths, axis=1)
        self._count(rows, in_prompt, lengths)

    def _count(
        self, rows: np.ndarray, in_prompt: np.ndarray, lengths: np.ndarray
    ) -> None:
        """Set what the step says of its tokens.

        Args:
            rows: `[tier, runs]`, of runs of tokens.
            in_prompt: bool `[runs]`.
            lengths: `[runs]`.
        """
        used = (rows != 0) * lengths
        prefill = used[:, in_prompt].sum(axis=1)
        self.steered = np.stack([prefill, used.sum(axis=1) - prefill], axis=1)
        self.rows = self._laid if self.steered.any() else None
        self.runs = rows, in_prompt.copy(), lengths


def _phase_stops(slots: int, width: int) -> np.ndarray:
    """`[slots, width]`: the prompt's end, then none."""
    stops: np.ndarray = np.full((slots, width), NO_STOP, dtype=np.int64)
    stops[:, 0] = 0
    return stops


def _starts_of(stops: np.ndarray) -> np.ndarray:
    """`[slots, width]`: where each piece begins; the first one before any position."""
    starts: np.ndarray = np.full_like(stops, -NO_STOP)
    starts[:, 1:] = stops[:, :-1]
    return starts


def _piece_at(
    pieces: Sequence[tuple[int, Rows]], position: int
) -> tuple[int, int, Rows]:
    """Where the piece of a position begins and stops, and its rows."""
    start = -NO_STOP
    for stop, rows in pieces:
        if position < stop:
            return start, stop, rows
        start = stop
    raise AssertionError("the last piece has no end")
