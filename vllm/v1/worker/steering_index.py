# SPDX-License-Identifier: Apache-2.0
"""From the batch's spans to the row of every token.

The phase of a token is decided by its position alone, so chunking, preemption,
recompute, draft tokens and prefix-cache hits cannot change it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vllm.config.sae_steering_plan import NO_STOP, SteeringPlan


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


Rows = tuple[int, ...]
# Tokens that follow one another and have the same rows: their rows [tier, runs],
# whether they are of the prompt [runs], and how many there are [runs].
Runs = tuple[np.ndarray, np.ndarray, np.ndarray]
# One run that changes: its rows and its phase (0: prefill) before, and after.
Move = tuple[Rows, int, Rows, int]
# So many requests that enter another piece are moved one by one.
FEW = 16


@dataclass(frozen=True, eq=False)
class RequestRows:
    """The rows that one request holds in the pieces of its schedule.

    Attributes:
        stops: int64 `[pieces]`, where each one stops, counted from the end of the
            prompt (negative: within it). One stops at 0, the last one at `NO_STOP`.
        rows: int32 `[pieces, tiers]`, 0 where a tier does nothing.
    """

    stops: np.ndarray
    rows: np.ndarray

    @property
    def held(self) -> list[int]:
        """The rows of all pieces and tiers."""
        return self.rows.ravel().tolist()

    @classmethod
    def of_plan(cls, plan: SteeringPlan, held: Sequence[int]) -> RequestRows:
        """The schedule of a plan of whose rows the request holds these."""
        stops: np.ndarray = np.frombuffer(plan.stops, np.int64)
        row_at: np.ndarray = np.array((0, *held), dtype=np.int32)
        places: np.ndarray = np.frombuffer(plan.places, np.int32)
        return cls(stops, row_at[places].reshape(len(stops), -1))

    @classmethod
    def of_pieces(cls, pieces: Iterable[tuple[int, Rows]]) -> RequestRows:
        """From the stop and the rows of each piece."""
        stops, rows = zip(*pieces, strict=True)
        return cls(np.array(stops, dtype=np.int64), np.array(rows, dtype=np.int32))

    @classmethod
    def of_phases(cls, prefill: Rows, decode: Rows) -> RequestRows:
        """The rows of the prompt's tokens, and of all others."""
        return cls.of_pieces(((0, prefill), (NO_STOP, decode)))


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
        runs: the same tokens as `rows`; another object where all have changed.
        moves: runs of the object before that have changed in this step.
    """

    def __init__(self, num_tiers: int):
        self.num_tiers = num_tiers
        self.rows: np.ndarray | None = None
        self.steered: np.ndarray = np.zeros((num_tiers, 2), dtype=np.int64)
        self.runs: Runs | None = None
        self.moves: list[Move] = []
        # [slot, piece, tier]: a slot for each request that holds rows, 0 for others.
        # Phases are two pieces; the width grows with the first request that has more.
        self._slots: np.ndarray = np.zeros((8, 2, num_tiers), dtype=np.int32)
        # [slot, piece]: where it stops, and begins, counted from the prompt's end.
        self._stops: np.ndarray = _phase_stops(8, 2)
        self._starts: np.ndarray = _starts_of(self._stops)
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
        n = len(rows.stops)
        if n > self.width:
            self._widen(n)
        if not self._free:
            self._lengthen()
        slot = self._slot_of[req_id] = self._free.pop()
        self._slots[slot, :n] = rows.rows
        self._stops[slot, :n] = rows.stops
        if n < self.width:
            self._slots[slot, n:] = 0
            self._stops[slot, n:] = NO_STOP
        self._starts[slot, 1:] = self._stops[slot, :-1]
        self._req_ids = None

    def _widen(self, width: int) -> None:
        """Make room for requests of more pieces."""
        size, more = len(self._slots), width - self.width
        self._slots = np.pad(self._slots, ((0, 0), (0, more), (0, 0)))
        never: np.ndarray = np.full((size, more), NO_STOP, dtype=np.int64)
        self._stops = np.concatenate([self._stops, never], axis=1)
        self._starts = _starts_of(self._stops)

    def _lengthen(self) -> None:
        """Make room for as many requests again."""
        size = len(self._slots)
        self._slots = np.concatenate([self._slots, np.zeros_like(self._slots)])
        stops = _phase_stops(size, self.width)
        self._stops = np.concatenate([self._stops, stops])
        self._starts = _starts_of(self._stops)
        self._free = list(range(2 * size - 1, size - 1, -1))

    def drop(self, req_id: str) -> None:
        """The request holds no rows any more."""
        self._free.append(self._slot_of.pop(req_id))
        self._req_ids = None

    def update(self, view: BatchView) -> Sequence[int]:
        """Follow a step; the tiers whose `rows` may have changed."""
        self.moves = []
        n = len(view.req_ids)
        scheduled, computed = view.num_scheduled[:n], view.num_computed[:n]
        same_batch = view.req_ids == self._req_ids
        if not same_batch:
            slots = [self._slot_of.get(req_id, 0) for req_id in view.req_ids]
            self._batch = np.array(slots, dtype=np.int64)
            self._req_ids = list(view.req_ids)
        elif (scheduled == self._scheduled).all():
            # A position before the piece wraps around, beyond any room.
            left = (computed - self._base).view(np.uint64) > self._room
            moved = left.nonzero()[0]
            if not len(moved):
                return ()
            if self._one_each and len(moved) <= FEW:
                return self._enter_pieces(view, moved.tolist())
        self._scheduled = scheduled.astype(np.int64)
        self._one_each = bool((scheduled == 1).all())
        self._lay_out(view)
        return range(self.num_tiers)

    def _enter_pieces(self, view: BatchView, moved: Sequence[int]) -> Sequence[int]:
        """Give these few requests, of one token each, the rows of their new piece.

        A loop: for a handful of requests it is faster than arrays.
        """
        tiers: set[int] = set()
        assert self.runs is not None
        run_rows, run_in_prompt, _ = self.runs  # of one request each
        for at in moved:
            prompt_len = int(view.prompt_len[at])
            position = int(view.num_computed[at]) - prompt_len
            slot = self._batch[at]
            stops = self._stops[slot].tolist()
            piece = bisect_right(stops, position)
            start, stop = stops[piece - 1] if piece else -NO_STOP, stops[piece]
            rows = self._slots[slot, piece].tolist()
            column = self._laid[:, at]
            had = column.tolist()
            tiers.update(t for t, row in enumerate(rows) if row != had[t])
            was, now = [row != 0 for row in had], [row != 0 for row in rows]
            phase, before = int(position >= 0), int(not self._in_prompt[at])
            if (was, before) != (now, phase):
                self.steered[:, before] -= was
                self.steered[:, phase] += now
                self.rows = self._laid if self.steered.any() else None
            self.moves.append((had, before, rows, phase))
            column[:] = run_rows[:, at] = rows
            self._base[at] = start + prompt_len
            self._room[at] = stop - start - 1
            self._in_prompt[at] = run_in_prompt[at] = position < 0
        return sorted(tiers)

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
