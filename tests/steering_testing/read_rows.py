# SPDX-License-Identifier: Apache-2.0
"""Requests that read, and rows that say their own position."""

from __future__ import annotations

import numpy as np

from vllm import SamplingParams
from vllm.config.sae_readout_specs import SiteRead
from vllm.config.steering_points import HookPoint
from vllm.v1.engine.steering_reads import RequestReads
from vllm.v1.request import Request

READ = SiteRead("m", HookPoint.POST_BLOCK, 1, 1, (), ((5, 100.0),), "both")
PROMPT, SLOT = 6, 0


def rows_of(positions: list[int], fires: int | None = None) -> np.ndarray:
    """Rows that say their own position: value and feature `position`."""
    rows = np.zeros((len(positions), READ.width), dtype=np.int32)
    rows[:, 0] = rows[:, 1] = 1
    values = rows[:, 2:].view(np.float32)
    for at, position in enumerate(positions):
        rows[at, 3] = position
        values[at, 2] = float(position)
        values[at, 0] = 200.0 if position == fires else 0.0
    return rows


def request_of(req_id: str, min_tokens: int = 0, client: int = 0) -> Request:
    ids = list(range(PROMPT))
    params = SamplingParams(max_tokens=9)
    request = Request(req_id, ids, params, None, client_index=client)
    request.sae_reads = RequestReads((READ,), (SLOT,), (99,), PROMPT, min_tokens)
    return request
