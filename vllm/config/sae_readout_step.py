# SPDX-License-Identifier: Apache-2.0
"""What the workers hand to the scheduler: the rows that a step has read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

# On a `ModelRunnerOutput`: its `StepReadout`, where some request reads.
READOUT_ATTRIBUTE = "sae_readout"


@dataclass(frozen=True)
class StepReadout:
    """What the sites of a step have read, on the host.

    Attributes:
        req_ids: the reading requests, in batch order; the lists below go with them.
        first_rows: each one's first token's place among the step's tokens.
        num_tokens: its tokens in the step, drafts included.
        num_computed: position of its first token, as the worker knows it: draft
            tokens that are rejected later may still count.
        first_row: the step's token that row 0 of every array stands for.
        rows: for each slot that was read, int32 `[n, width]`, rows as
            `vllm.config.sae_features` has them.
    """

    req_ids: list[str]
    first_rows: list[int]
    num_tokens: list[int]
    num_computed: list[int]
    first_row: int
    rows: Mapping[int, np.ndarray]
