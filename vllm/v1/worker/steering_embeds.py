# SPDX-License-Identifier: Apache-2.0
"""Prompt positions that a client gives as embeddings. They have no token id.

The runners keep some id for such a position (zero, or what an earlier request left in
its place). The bypass by token id must not use it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.steering_index import BatchView

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import NewRequestData

NO_TOKEN_ID = -1


def embedded_positions(new: NewRequestData) -> np.ndarray | None:
    """bool `[prompt]`, true where a position has no id; None if all have one."""
    if new.prompt_embeds is None:
        return None
    if new.prompt_is_token_ids is not None:
        return ~np.asarray(new.prompt_is_token_ids, dtype=bool)
    return np.ones(new.prompt_embeds.shape[0], dtype=bool)


def known_token_ids(
    view: BatchView, num_tokens: int, embedded: Mapping[str, np.ndarray]
) -> torch.Tensor:
    """The ids `[num_tokens]` of a step's tokens, `NO_TOKEN_ID` where there is none.

    Args:
        view: the step.
        num_tokens: tokens of the step.
        embedded: the `embedded_positions` of requests that have some.
    """
    ids = view.token_ids[:num_tokens]
    if not embedded:
        return ids
    unknown: np.ndarray = np.zeros(num_tokens, dtype=bool)
    start = 0
    for at, req_id in enumerate(view.req_ids):
        count, computed = int(view.num_scheduled[at]), int(view.num_computed[at])
        if req_id in embedded:
            part = embedded[req_id][computed : computed + count]
            unknown[start : start + len(part)] = part
        start += count
    if not unknown.any():
        return ids
    return ids.masked_fill(async_tensor_h2d(unknown, device=ids.device), NO_TOKEN_ID)
