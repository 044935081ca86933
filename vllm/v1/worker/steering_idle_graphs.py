# SPDX-License-Identifier: Apache-2.0
"""Twins of CUDA graphs, without steering, for steps in which nobody steers or reads.

Each graph is captured twice: with the launches of every site, and without any. Both
serve the same padded batch, so what the runner dispatches, pads and agrees on with
data-parallel ranks does not change. Only the key of the graph differs: a twin's
descriptor is of a class of its own, and equals no other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from vllm.config.steering_environment import IDLE_GRAPHS_ENV
from vllm.distributed import get_tp_group
from vllm.forward_context import BatchDescriptor
from vllm.logger import init_logger
from vllm.model_executor.layers.steering_capture import idle_graphs_are_on
from vllm.model_executor.layers.steering_state import StepState

logger = init_logger(__name__)


def ranks_want_idle_graphs() -> bool:
    """Whether every rank of the tensor-parallel group is asked for twins.

    Where ranks share SAEs, a twin holds none of their exchanges, so all must replay the
    same graph of a pair. Ranks on other hosts may have another environment. All ranks
    call this at the same time.
    """
    group, is_on = get_tp_group(), idle_graphs_are_on()
    asked = torch.tensor([int(is_on)], device="cpu")
    if group.world_size > 1:
        least = torch.distributed.ReduceOp.MIN
        torch.distributed.all_reduce(asked, op=least, group=group.cpu_group)
    if is_on and not asked:
        logger.warning(
            "Steering: no graphs for idle steps, because %s is 1 on this rank and not "
            "on all",
            IDLE_GRAPHS_ENV,
        )
    return bool(asked)


@dataclass(frozen=True)
class IdleBatchDescriptor(BatchDescriptor):
    """The key of the twin of a descriptor's graph."""

    @classmethod
    def of(cls, desc: BatchDescriptor) -> IdleBatchDescriptor:
        """The twin's key, for the same batch."""
        return cls(**vars(desc))


class IdleGraphs:
    """Which graph of a pair a forward captures or replays; one object per worker.

    Args:
        step: the worker's step state; its `idle_graph` is set while a twin is captured.
        is_idle: whether no token of the prepared step is edited or read.

    Attributes:
        piecewise: twins that were captured for PIECEWISE mode, where nothing else says
            what was captured (the second runner).
    """

    def __init__(self, step: StepState, is_idle: Callable[[], bool]):
        self._step = step
        self._is_idle = is_idle
        self._capturing = False
        self.piecewise: set[BatchDescriptor] = set()

    @property
    def chosen(self) -> bool:
        """Whether the next forward is the twin's."""
        return self._step.idle_graph if self._capturing else self._is_idle()

    def begin(self, twin: bool) -> None:
        """From now on, twins are captured, or the graphs with all launches."""
        self._capturing = True
        self._step.idle_graph = twin

    def end(self) -> None:
        """From now on, graphs are replayed."""
        self._capturing = self._step.idle_graph = False

    @contextmanager
    def capture(self, twin: bool) -> Iterator[None]:
        """Within the block, see `begin`."""
        self.begin(twin)
        try:
            yield
        finally:
            self.end()

    def piecewise_key(self, desc: BatchDescriptor) -> BatchDescriptor:
        """The key of the graph that the next PIECEWISE forward captures or replays."""
        if not self.chosen:
            return desc
        twin = IdleBatchDescriptor.of(desc)
        if self._capturing:
            self.piecewise.add(twin)
        return twin if twin in self.piecewise else desc
