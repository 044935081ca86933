# SPDX-License-Identifier: Apache-2.0
"""Ranks on one device: threads of which one runs at a time, between exchanges."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import torch

from vllm.model_executor.layers.steering_shards import Shard

T = TypeVar("T")


class Lockstep:
    """A group of ranks. Triton's interpreter cannot run two kernels at once."""

    def __init__(self, size: int):
        self.size = size
        self._turn = threading.Lock()
        # A rank that never comes is seen before the test's own limit of 600 s.
        self._all = threading.Barrier(size, timeout=540)
        self._parts: list[torch.Tensor | None] = [None] * size
        self._arenas: list[list[torch.Tensor]] = [[] for _ in range(size)]

    def _pass_on(self) -> None:
        """Let the others run until they all wait here."""
        self._turn.release()
        self._all.wait()
        self._turn.acquire()

    def shard(self, rank: int, device: torch.device | None = None) -> Shard:
        """A rank; with a device, one that can address the memory of the others."""

        def stack(own: torch.Tensor) -> torch.Tensor:
            self._parts[rank] = own
            self._pass_on()
            every = torch.stack([part for part in self._parts if part is not None])
            assert len(every) == self.size
            self._pass_on()
            return every

        def allocate(nbytes: int) -> list[int]:
            arena = torch.zeros(nbytes, dtype=torch.uint8, device=device)
            self._arenas[rank].append(arena)
            self._pass_on()
            return [arenas[-1].data_ptr() for arenas in self._arenas]

        if device is None:
            return Shard(rank, self.size, stack)
        return Shard(rank, self.size, stack, allocate, self._pass_on)

    def run(
        self, work: Callable[[Shard], T], device: torch.device | None = None
    ) -> list[T]:
        """`work` of every rank, in rank order; raises what one of them raises."""
        results: list[T | None] = [None] * self.size
        errors: list[BaseException] = []

        def main(rank: int) -> None:
            with self._turn:
                try:
                    results[rank] = work(self.shard(rank, device))
                except threading.BrokenBarrierError as error:
                    errors.append(error)
                except BaseException as error:
                    errors.insert(0, error)
                    self._all.abort()

        threads = [
            threading.Thread(target=main, args=(rank,)) for rank in range(self.size)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return [result for result in results if result is not None]
