# SPDX-License-Identifier: Apache-2.0
"""A worker's reading while the slots of modules come and go."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from vllm.config.sae_readout_specs import SiteRead
from vllm.config.steering_points import HookPoint
from vllm.model_executor.layers.steering_read_state import ReadBuffers
from vllm.model_executor.layers.steering_state import StepState
from vllm.v1.worker.steering_index import BatchView
from vllm.v1.worker.steering_readout import SteeringReadout

CPU = torch.device("cpu")
ROWS, TOKENS, TOP_K = 5, 16, 3


class Slots:
    """Slots that hold a module each, by name of the module."""

    def __init__(self) -> None:
        self.at: dict[str, int] = {}
        self.buffers: dict[int, ReadBuffers] = {}

    def add(self, module: str, slot: int) -> ReadBuffers:
        self.at[module] = slot
        return self.buffers.setdefault(slot, ReadBuffers(ROWS, 8, TOKENS, 32, CPU))

    def remove(self, module: str) -> None:
        del self.buffers[self.at.pop(module)]

    def read_buffers(self) -> Mapping[int, ReadBuffers]:
        return dict(self.buffers)

    def read_slot(self, read: SiteRead) -> int | None:
        return self.at.get(read.module)


def read_once(readout: SteeringReadout, req_id: str, *modules: str) -> set[int]:
    """A request that reads these modules for a step; the slots that it has read."""
    reads = tuple(
        SiteRead(name, HookPoint.POST_BLOCK, 1, TOP_K, (), (), "both")
        for name in modules
    )
    readout.resume_request(req_id, reads)
    ids = torch.arange(4, dtype=torch.int32)
    view = BatchView([req_id], np.array([4]), np.array([0]), np.array([4]), ids)
    assert readout.prepare_step(view)
    step = readout.take_step()
    assert step is not None
    readout.park_request(req_id)
    readout.check_integrity()
    return set(step.rows)


def test_reading_goes_on_when_a_slot_that_was_read_is_gone() -> None:
    slots = Slots()
    first = slots.add("first", 0)
    readout = SteeringReadout(slots, StepState(TOKENS, CPU), ROWS, True)
    for name in ("a", "b"):
        # The same slot is made anew for each of them.
        table = slots.add(name, 1).packed
        assert read_once(readout, f"{name}1", name) == {1}
        assert read_once(readout, f"{name}2", "first", name) == {0, 1}
        assert table[:, 0].sum() == 1
        slots.remove(name)
        assert read_once(readout, f"{name}3", "first") == {0}
        assert first.packed[:, 0].sum() == 1
