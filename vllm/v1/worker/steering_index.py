# SPDX-License-Identifier: Apache-2.0
"""Computes the row of every token of a step.

The phase of a token is decided by its position alone, so chunking, preemption,
recompute, draft tokens and prefix-cache hits cannot change it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class BatchView:
    """What steering needs to know of a step. Each runner builds it from its own batch.

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
        """The schedule; a request with phases has two pieces."""
        return self.schedule or ((0, self.prefill), (NO_STOP, self.decode))

    def held(self, tier: int) -> list[int]:
        """The tier's row of each piece."""
        return [rows[tier] for _, rows in self.pieces]


def phase_counts(view: BatchView) -> np.ndarray:
    """`[2n]` tokens of the step: prefill and decode of each request in turn."""
    n = len(view.req_ids)
    scheduled = view.num_scheduled[:n]
    left = view.prompt_len[:n] - view.num_computed[:n]
    counts: np.ndarray = np.empty((n, 2), dtype=np.int64)
    np.minimum(np.maximum(left, 0), scheduled, out=counts[:, 0])
    np.subtract(scheduled, counts[:, 0], out=counts[:, 1])
    return counts.reshape(-1)


def piece_counts(view: BatchView, stops: np.ndarray) -> np.ndarray:
    """`[nW]` tokens of the step: those of each piece of each request in turn.

    Args:
        view: of the step.
        stops: `[n, W]` where the pieces stop, counted from the end of the prompt.
    """
    n = len(view.req_ids)
    first = view.num_computed[:n].astype(np.int64) - view.prompt_len[:n]
    bounds = np.concatenate([first[:, None], stops], axis=1)
    last = (first + view.num_scheduled[:n])[:, None]
    np.clip(bounds, first[:, None], last, out=bounds)
    return np.diff(bounds, axis=1).reshape(-1)


class StepIndex:
    """The rows of a step's tokens, computed again only when the batch has changed.

    While the same requests decode, a step costs only a comparison. A change of the
    batch or of a request's rows gathers the rows again. A change of the token counts
    lays them out again.

    Attributes:
        rows: int32 `[tier, tokens]`, the row of every token; None if all are 0.
        steered: int64 `[tier, phase]`, number of the step's tokens that have a row
            (prefill, decode).
    """

    def __init__(self, num_tiers: int):
        self.num_tiers = num_tiers
        self.rows: np.ndarray | None = None
        self.steered: np.ndarray = np.zeros((num_tiers, 2), dtype=np.int64)
        # [slot, piece, tier]: a slot for each request that holds rows, 0 for others.
        # Phases are two pieces; the width grows with the first request that has more.
        self._slots: np.ndarray = np.zeros((8, 2, num_tiers), dtype=np.int32)
        self._stops: np.ndarray = _phase_stops(8, 2)
        self._slot_of: dict[str, int] = {}
        self._free = list(range(7, 0, -1))
        self._req_ids: list[str] | None = None
        self._held: np.ndarray = np.zeros((num_tiers, 0), dtype=np.int32)
        self._batch_stops: np.ndarray = _phase_stops(0, 2)
        self._counts: np.ndarray = np.zeros(0, dtype=np.int64)
        self._batch_slots: np.ndarray = np.zeros(0, dtype=np.int64)
        # The piece of each request's token, if the last step had one token of each.
        self._pieces: np.ndarray | None = None

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
        if not self._free:
            self._slots = np.concatenate([self._slots, np.zeros_like(self._slots)])
            stops = _phase_stops(size, self.width)
            self._stops = np.concatenate([self._stops, stops])
            self._free = list(range(2 * size - 1, size - 1, -1))
        slot = self._slot_of[req_id] = self._free.pop()
        self._slots[slot] = 0
        self._stops[slot] = NO_STOP
        for at, (stop, held) in enumerate(pieces):
            self._slots[slot, at] = held
            self._stops[slot, at] = stop
        self._req_ids = None

    def drop(self, req_id: str) -> None:
        """The request holds no rows any more."""
        self._free.append(self._slot_of.pop(req_id))
        self._req_ids = None

    def update(self, view: BatchView) -> bool:
        """Follow a step; whether `rows` may have changed."""
        same_batch = view.req_ids == self._req_ids
        if not same_batch:
            slots = [self._slot_of.get(req_id, 0) for req_id in view.req_ids]
            held = self._slots[slots].transpose(2, 0, 1)
            self._held = held.reshape(self.num_tiers, -1)
            self._batch_stops = self._stops[slots]
            self._batch_slots = np.array(slots, dtype=np.int64)
            self._pieces = None
            self._req_ids = list(view.req_ids)
        if self.width == 2:
            counts = phase_counts(view)
        elif (view.num_scheduled[: len(view.req_ids)] == 1).all():
            return self._update_single(view)
        else:
            counts = piece_counts(view, self._batch_stops)
            self._pieces = None
        if same_batch and np.array_equal(counts, self._counts):
            return False
        self._counts = counts
        used = (self._held != 0) * counts
        in_prompt = self._batch_stops.reshape(-1) <= 0
        prefill = used[:, in_prompt].sum(axis=1)
        self.steered = np.stack([prefill, used.sum(axis=1) - prefill], axis=1)
        steers = bool(self.steered.any())
        self.rows = np.repeat(self._held, counts, axis=1) if steers else None
        return True

    def _update_single(self, view: BatchView) -> bool:
        """Follow a step of one token a request: which piece each has reached."""
        n = len(view.req_ids)
        at = view.num_computed[:n].astype(np.int64) - view.prompt_len[:n]
        pieces = (at[:, None] >= self._batch_stops).sum(axis=1)
        if self._pieces is not None and np.array_equal(pieces, self._pieces):
            return False
        self._pieces = pieces
        self._counts = np.zeros(0, dtype=np.int64)  # none of `piece_counts`
        rows = self._slots[self._batch_slots, pieces]
        used = rows != 0
        prefill = used[at < 0].sum(axis=0)
        self.steered = np.stack([prefill, used.sum(axis=0) - prefill], axis=1)
        self.rows = np.ascontiguousarray(rows.T) if used.any() else None
        return True


def _phase_stops(slots: int, width: int) -> np.ndarray:
    """`[slots, width]`: the prompt's end, then none."""
    stops: np.ndarray = np.full((slots, width), NO_STOP, dtype=np.int64)
    stops[:, 0] = 0
    return stops
