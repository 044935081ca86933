# SPDX-License-Identifier: Apache-2.0
"""Of the modules at a site, a captured step runs those that have tokens.

A conditional node of the CUDA graph (`csrc/steering/branch_ops.cu`) has a body for each
module, which runs where that module alone has tokens, and a last one with all of them.
So modules that a step does not use cost one small kernel together, not their launches.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch

from vllm.config.steering import Tier
from vllm.config.steering_environment import BRANCHES_ENV
from vllm.model_executor.layers.steering_state import SAESlot, StepState

from .extension import Kernels, cuda_ops, kernels_for

# At a site. A body costs 12 us more than its launches; an idle module costs 4 without.
LEAST_MODULES = 6
MOST_MODULES = 16

Launch = Callable[[Sequence[SAESlot]], None]


class Branches:
    """Captures the bodies on a stream of its own.

    Args:
        device: a GPU for which `can_branch` holds.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def capture(self, slots: Sequence[SAESlot], step: StepState, n: int,
                launch: Launch) -> None:  # fmt: skip
        """Put `launch` of each slot, and of all, behind a conditional node.

        Args:
            n: tokens of the step; the current stream is being captured.
            launch: launches reading and full reconstruction of these slots, of which
                no others have tokens. It must not allocate.
        """
        ops, index = cuda_ops(), step.index[Tier.FULL]
        bodies = torch.zeros(len(slots) + 1, dtype=torch.int64)
        tables = [slot.full.packed for slot in slots]
        reads = [slot.reads.packed for slot in slots if slot.reads is not None]
        ops.branch(index, tables, step.read_index, reads, n, bodies)
        chosen = [[slot] for slot in slots]
        for body, some in zip(bodies.tolist(), [*chosen, slots], strict=True):
            with torch.cuda.stream(self._stream):
                ops.begin_body(index, body)
                launch(some)
                ops.end_body(index)


def fits(slots: Sequence[SAESlot]) -> bool:
    """Whether a site's modules can be told apart: all read, or none, and whole SAEs."""
    reading = {slot.reads is not None for slot in slots}
    return (
        LEAST_MODULES <= len(slots) <= MOST_MODULES
        and len(reading) == 1
        and all(slot.weights.shard.is_whole for slot in slots)
    )


def can_branch(device: torch.device) -> bool:
    """Whether it is asked for (`BRANCHES_ENV=1`), and the driver has conditional nodes
    with several bodies (CUDA 12.8)."""
    asked = os.environ.get(BRANCHES_ENV) == "1"
    if not asked or Kernels.STAGES not in kernels_for(device):
        return False
    return bool(cuda_ops().has_branches(torch.empty(0, device=device)))
