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
    prefill = np.clip(view.prompt_len[:n] - view.num_computed[:n], 0, scheduled)
    return np.stack([prefill, scheduled - prefill], axis=1).reshape(-1)


def token_rows(
    view: BatchView, rows_of: dict[str, RequestRows], num_tiers: int
) -> np.ndarray | None:
    """int32 `[num_tiers, tokens]` rows of the step's tokens; None if all are 0."""
    n = len(view.req_ids)
    rows: np.ndarray = np.zeros((num_tiers, n, 2), dtype=np.int32)
    steered = False
    for at, req_id in enumerate(view.req_ids):
        held = rows_of.get(req_id)
        if held is not None:
            rows[:, at, 0] = held.prefill
            rows[:, at, 1] = held.decode
            steered = True
    if not steered:
        return None
    per_token = np.repeat(rows.reshape(num_tiers, -1), phase_counts(view), axis=1)
    return per_token if per_token.any() else None


def count_steered(view: BatchView, rows: np.ndarray) -> np.ndarray:
    """int64 `[tier, phase]`: tokens of the step that have a row (prefill, decode)."""
    phases = np.tile([True, False], len(view.req_ids))
    is_prefill: np.ndarray = np.repeat(phases, phase_counts(view))
    steered = rows != 0
    both = steered.sum(axis=1)
    prompt = (steered & is_prefill).sum(axis=1)
    return np.stack([prompt, both - prompt], axis=1)
