# SPDX-License-Identifier: Apache-2.0
"""Places the vectors that requests bring on the device.

A vector takes one direction of its site's stack while a request of the batch uses it;
requests with the same content share it. A site has `per_request * max_num_seqs`
directions for them and a request uses at most `per_request`, so `acquire` cannot fail.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from vllm.config.sae_steering_plan import PlannedVector
from vllm.config.steering import InlineSite
from vllm.model_executor.layers.steering import SiteKey
from vllm.model_executor.layers.steering_state import VectorSlot
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.steering_tables import BoundTable

# Of one request.
Vectors = Sequence[PlannedVector]


@dataclass
class _Held:
    """A direction that holds a vector, and how many requests use it."""

    direction: int
    users: int


@dataclass
class InlineStack:
    """The directions of one site that requests may take.

    Attributes:
        slot: the site's vectors, of which those of modules come first.
        table: the site's clamp table.
        directions: those that are for requests.
    """

    slot: VectorSlot
    table: BoundTable
    directions: range
    free: list[int] = field(init=False)
    held: dict[str, _Held] = field(default_factory=dict)
    # What to upload before the next forward, by direction.
    pending: dict[int, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.free = list(self.directions)

    def upload(self) -> None:
        """Copy new vectors to the device, in stream order, without blocking."""
        if not self.pending:
            return
        on_device = self.slot.directions
        where = np.fromiter(self.pending, dtype=np.int64, count=len(self.pending))
        data = np.stack([np.frombuffer(d, "<f4") for d in self.pending.values()])
        self.pending.clear()
        on_device.index_copy_(
            0,
            async_tensor_h2d(where, device=on_device.device),
            async_tensor_h2d(data, device=on_device.device),
        )


def make_stack(
    modules: int,
    site: InlineSite | None,
    width: int,
    num_rows: int,
    device: torch.device,
) -> InlineStack:
    """Make the stack of one site's vectors, for modules and for requests.

    Args:
        modules: slots for vector modules, which come first.
        site: the room for requests, if there is any.
        width: D of the site.
        num_rows: of the clamp table.
        device: of the buffers.
    """
    per_request = 0 if site is None else site.per_request
    directions = modules + (0 if site is None else site.directions)
    # A bound takes two places of a row.
    places = 2 * (modules + per_request)
    slot = VectorSlot(directions, width, num_rows, places, device)
    return InlineStack(slot, BoundTable(slot.table), range(modules, directions))


class InlineVectors:
    """The inline vectors of the requests that are in the batch, on this rank."""

    def __init__(self) -> None:
        self.stacks: dict[SiteKey, InlineStack] = {}

    @property
    def in_use(self) -> int:
        """Directions that some request uses."""
        return sum(len(stack.held) for stack in self.stacks.values())

    def acquire(self, vectors: Vectors) -> None:
        """Give the vectors of a request that enters the batch their directions."""
        for vector, stack in self._stacks_of(vectors):
            held = stack.held.get(vector.module)
            if held is not None:
                held.users += 1
                continue
            direction = heapq.heappop(stack.free)
            stack.held[vector.module] = _Held(direction, 1)
            stack.pending[direction] = vector.data

    def release(self, vectors: Vectors) -> None:
        """A request leaves the batch: free what no other request uses."""
        for vector, stack in self._stacks_of(vectors):
            held = stack.held[vector.module]
            held.users -= 1
            if held.users:
                continue
            del stack.held[vector.module]
            stack.pending.pop(held.direction, None)
            heapq.heappush(stack.free, held.direction)

    def find(self, module: str, key: SiteKey) -> tuple[BoundTable, int] | None:
        """The table and the direction of a vector, or None if not on this rank."""
        stack = self.stacks.get(key)
        held = None if stack is None else stack.held.get(module)
        return None if stack is None or held is None else (stack.table, held.direction)

    def upload(self) -> None:
        """Bring the device up to date, before the rows that use the directions."""
        for stack in self.stacks.values():
            stack.upload()

    def _stacks_of(
        self, vectors: Vectors
    ) -> Iterable[tuple[PlannedVector, InlineStack]]:
        """Those of the vectors whose site is on this rank."""
        for vector in vectors:
            stack = self.stacks.get(SiteKey(vector.layer, vector.hook))
            if stack is not None:
                yield vector, stack

    def check_integrity(self, requests: Iterable[Vectors]) -> None:
        """Raise AssertionError unless exactly the requests' vectors are held.

        Args:
            requests: the vectors of each request of the batch.
        """
        users: dict[tuple[int, str], int] = {}
        for vectors in requests:
            for vector, stack in self._stacks_of(vectors):
                key = (id(stack), vector.module)
                users[key] = users.get(key, 0) + 1
        found = {
            (id(stack), name): held.users
            for stack in self.stacks.values()
            for name, held in stack.held.items()
        }
        assert found == users, "inline vectors and requests disagree"
        for stack in self.stacks.values():
            taken = [held.direction for held in stack.held.values()]
            assert sorted([*taken, *stack.free]) == list(stack.directions), (
                "a direction is lost, or held twice"
            )
            assert set(stack.pending) <= set(taken), "a free direction awaits writing"
