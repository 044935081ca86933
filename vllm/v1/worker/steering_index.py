# SPDX-License-Identifier: Apache-2.0
"""From the batch's spans to the row of every token.

The phase of a token is decided by its position alone, so chunking, preemption,
recompute, draft tokens and prefix-cache hits cannot change it.
"""

from __future__ import annotations

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


@dataclass(frozen=True)
class RequestRows:
    """The rows that one request holds: `[tier]`, 0 where a tier does nothing."""

    prefill: tuple[int, ...]
    decode: tuple[int, ...]


def phase_counts(view: BatchView) -> np.ndarray:
    """`[2n]` tokens of the step: prefill and decode of each request in turn."""
    n = len(view.req_ids)
    scheduled = view.num_scheduled[:n]
    left = view.prompt_len[:n] - view.num_computed[:n]
    counts: np.ndarray = np.empty((n, 2), dtype=np.int64)
    np.minimum(np.maximum(left, 0), scheduled, out=counts[:, 0])
    np.subtract(scheduled, counts[:, 0], out=counts[:, 1])
    return counts.reshape(-1)


class StepIndex:
    """The rows of a step's tokens, made anew only where the batch has changed.

    While the same requests decode, a step costs a comparison: the rows are gathered
    again when the batch or a request's rows change, and laid out again when the
    spans do.

    Attributes:
        rows: int32 `[tier, tokens]`, the row of every token; None if all are 0.
        steered: int64 `[tier, phase]`, tokens of the step that have a row (prefill,
            decode).
    """

    def __init__(self, num_tiers: int):
        self.num_tiers = num_tiers
        self.rows: np.ndarray | None = None
        self.steered: np.ndarray = np.zeros((num_tiers, 2), dtype=np.int64)
        # [slot, phase, tier]: a slot for each request that holds rows, 0 for others.
        self._slots: np.ndarray = np.zeros((8, 2, num_tiers), dtype=np.int32)
        self._slot_of: dict[str, int] = {}
        self._free = list(range(7, 0, -1))
        self._req_ids: list[str] | None = None
        self._held: np.ndarray = np.zeros((num_tiers, 0), dtype=np.int32)
        self._counts: np.ndarray = np.zeros(0, dtype=np.int64)

    @property
    def holders(self) -> set[str]:
        """Requests that hold rows."""
        return set(self._slot_of)

    def hold(self, req_id: str, rows: RequestRows) -> None:
        """From now on the request has these rows."""
        if not self._free:
            size = len(self._slots)
            self._slots = np.concatenate([self._slots, np.zeros_like(self._slots)])
            self._free = list(range(2 * size - 1, size - 1, -1))
        slot = self._slot_of[req_id] = self._free.pop()
        self._slots[slot] = (rows.prefill, rows.decode)
        self._req_ids = None

    def drop(self, req_id: str) -> None:
        """The request holds no rows any more."""
        self._free.append(self._slot_of.pop(req_id))
        self._req_ids = None

    def update(self, view: BatchView) -> bool:
        """Follow a step; whether `rows` may have changed."""
        counts = phase_counts(view)
        same_batch = view.req_ids == self._req_ids
        if same_batch and np.array_equal(counts, self._counts):
            return False
        if not same_batch:
            slots = [self._slot_of.get(req_id, 0) for req_id in view.req_ids]
            held = self._slots[slots].transpose(2, 0, 1)
            self._held = held.reshape(self.num_tiers, -1)
            self._req_ids = list(view.req_ids)
        self._counts = counts
        used = (self._held != 0) * counts
        self.steered = used.reshape(self.num_tiers, -1, 2).sum(axis=1)
        steers = bool(self.steered.any())
        self.rows = np.repeat(self._held, counts, axis=1) if steers else None
        return True
