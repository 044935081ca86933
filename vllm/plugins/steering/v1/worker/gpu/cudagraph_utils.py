# SPDX-License-Identifier: Apache-2.0
"""Seam into `vllm.v1.worker.gpu.cudagraph_utils`: a twin without steering of every
graph (Model Runner V2).

The edit a branch would make: `BatchExecutionDescriptor` says whether a step uses
steering, and the manager captures both kinds. Here a twin's descriptor is of a class of
its own. The batch is dispatched before its steering is known, so the manager chooses
between the two when it runs a graph. Only the manager of the model with sites has
`idle_graphs`; a speculator's is stock.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.forward_context import get_forward_context
from vllm.plugins.steering.seam import Stock, declare, wrap
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor

if TYPE_CHECKING:
    from torch import nn

    from vllm.v1.worker.gpu.cudagraph_utils import CreateForwardFn, CudaGraphManager

MANAGER = "vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager"


@dataclass(frozen=True)
class IdleExecutionDescriptor(BatchExecutionDescriptor):
    """The key of the twin of a descriptor's graph."""

    @classmethod
    def of(cls, desc: BatchExecutionDescriptor) -> IdleExecutionDescriptor:
        """The twin's key, for the same batch."""
        return cls(**vars(desc))


def install() -> None:
    """Give the manager twins, where it has `idle_graphs`."""
    declare(MANAGER, "idle_graphs")
    makes = ("self", "create_forward_fn", "progress_bar_desc")
    wrap(f"{MANAGER}.capture", makes, _capture)
    wrap(f"{MANAGER}.run_fullgraph", ("self", "desc"), _run_fullgraph)
    wrap(f"{MANAGER}.run_pw_graph", ("self", "model", "model_inputs"), _run_pw_graph)


def _add_twins(descs: list[BatchExecutionDescriptor]) -> None:
    """The twins come last, largest first, as the graphs before them.

    vLLM estimates the memory of all FULL graphs from the first two. These are two of
    the larger kind, so the estimate covers the twins.
    """
    if not any(isinstance(desc, IdleExecutionDescriptor) for desc in descs):
        descs += [IdleExecutionDescriptor.of(desc) for desc in descs]


def _capture(stock: Stock) -> Stock:
    def capture(
        self: CudaGraphManager,
        create_forward_fn: CreateForwardFn,
        *args: object,
        **kwargs: object,
    ) -> None:
        graphs = self.idle_graphs
        if graphs is None:
            return stock(self, create_forward_fn, *args, **kwargs)

        def create(desc: BatchExecutionDescriptor, warmup: bool) -> Callable[..., None]:
            # What the function launches, it launches before another one is made.
            graphs.begin(isinstance(desc, IdleExecutionDescriptor))
            return create_forward_fn(desc, warmup=warmup)

        for descs in self._capture_descs.values():
            _add_twins(descs)
        graphs.piecewise.clear()
        try:
            stock(self, create, *args, **kwargs)
        finally:
            graphs.end()

    return capture


def _run_fullgraph(stock: Stock) -> Stock:
    def run_fullgraph(self: CudaGraphManager, desc: BatchExecutionDescriptor) -> None:
        if self.idle_graphs is not None and self.idle_graphs.chosen:
            twin = IdleExecutionDescriptor.of(desc)
            desc = twin if twin in self.graphs else desc
        stock(self, desc)

    return run_fullgraph


def _run_pw_graph(stock: Stock) -> Stock:
    def run_pw_graph(
        self: CudaGraphManager, model: nn.Module, model_inputs: dict[str, object]
    ) -> object:
        if self.idle_graphs is not None:
            context = get_forward_context()
            desc = context.batch_descriptor
            if desc is not None:
                context.batch_descriptor = self.idle_graphs.piecewise_key(desc)
        return stock(self, model, model_inputs)

    return run_pw_graph
