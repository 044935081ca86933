# SPDX-License-Identifier: Apache-2.0
"""A model of PyTorch's caching allocator for one stream, fed with a program's tensors.

Its rules are those of `c10/cuda/CUDACachingAllocator.cpp` without expandable segments.
They are why the loader asks for one large block: see
`vllm.model_executor.layers.steering_chunks`.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

MIB = 1 << 20
SMALL = MIB  # the largest request of the small pool
SMALL_SEGMENT, LARGE_SEGMENT = 2 * MIB, 20 * MIB
OWN_SEGMENT = 10 * MIB  # from here on, a request gets a segment of its size
ROUNDING = 2 * MIB
UNIT = 512


@dataclass(eq=False)
class Block:
    """A part of a segment, which is in use or free."""

    segment: int
    start: int
    size: int
    small: bool
    used: bool = True


class CachingAllocator:
    """What a program keeps reserved, under `max_split_size`.

    Attributes:
        reserved: bytes of all segments; none is ever returned.
    """

    def __init__(self, max_split: int = LARGE_SEGMENT):
        self.max_split = max_split
        self.reserved = 0
        self._segments: list[list[Block]] = []

    def take(self, size: int) -> Block:
        """A block for a request."""
        size = max(-(-size // UNIT) * UNIT, UNIT)
        small = size <= SMALL
        block = self._cached(size, small) or self._fresh(size, small)
        block.used = True
        left = block.size - size
        splits = left >= UNIT if small else size < self.max_split and left > SMALL
        if splits:
            block.size = size
            rest = Block(block.segment, block.start + size, left, small, used=False)
            blocks = self._segments[block.segment]
            blocks.insert(blocks.index(block) + 1, rest)
        return block

    def give(self, block: Block) -> None:
        """Free a block, which joins its free neighbours."""
        block.used = False
        joined: list[Block] = []
        for one in self._segments[block.segment]:
            if joined and not joined[-1].used and not one.used:
                joined[-1].size += one.size
            else:
                joined.append(one)
        self._segments[block.segment] = joined

    def _cached(self, size: int, small: bool) -> Block | None:
        fitting = [
            block
            for blocks in self._segments
            for block in blocks
            if not block.used and block.small == small and block.size >= size
        ]
        if not fitting:
            return None
        block = min(fitting, key=lambda one: one.size)
        if size < self.max_split:
            return block if block.size < self.max_split else None
        return block if block.size < size + LARGE_SEGMENT else None

    def _fresh(self, size: int, small: bool) -> Block:
        if small:
            total = SMALL_SEGMENT
        elif size < OWN_SEGMENT:
            total = LARGE_SEGMENT
        else:
            total = -(-size // ROUNDING) * ROUNDING
        self.reserved += total
        block = Block(len(self._segments), 0, total, small)
        self._segments.append([block])
        return block


class Allocations(TorchDispatchMode):
    """Gives every tensor that is made inside the block to a `CachingAllocator`.

    Memory that an operation takes and frees inside itself is not seen, nor is a copy
    to a device that already holds the tensor.

    Attributes:
        sizes: bytes of each request, in order.
    """

    def __init__(self, allocator: CachingAllocator):
        super().__init__()
        self.allocator = allocator
        self.sizes: list[int] = []
        self._blocks: dict[int, Block] = {}
        self._tensors: dict[int, int] = {}
        self._seen: dict[int, weakref.ref[torch.Tensor]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        held = {
            tensor.untyped_storage()._cdata
            for tensor in (*args, *(kwargs or {}).values())
            if isinstance(tensor, torch.Tensor)
        }
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor, held)
        return found

    def _note(self, tensor: torch.Tensor, held: set[int]) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._seen.get(id(tensor))
        if known is not None and known() is tensor:
            return
        if key not in self._blocks:
            if key in held:
                return  # made outside
            self.sizes.append(storage.nbytes())
            self._blocks[key] = self.allocator.take(storage.nbytes())
        self._tensors[key] = self._tensors.get(key, 0) + 1
        self._seen[id(tensor)] = weakref.ref(tensor)
        weakref.finalize(tensor, self._drop, key)

    def _drop(self, key: int) -> None:
        self._tensors[key] -= 1
        if not self._tensors[key]:
            del self._tensors[key]
            self.allocator.give(self._blocks.pop(key))
