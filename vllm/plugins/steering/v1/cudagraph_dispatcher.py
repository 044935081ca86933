# SPDX-License-Identifier: Apache-2.0
"""Seam into `vllm.v1.cudagraph_dispatcher`: a twin without steering of every graph.

The edit a branch would make: `BatchDescriptor` says whether a step uses steering, as it
says `has_lora`, and the dispatcher has keys for both. Here a twin's key is an
`IdleBatchDescriptor`. Only the dispatcher of the model with sites has `idle_graphs`;
a drafter's is stock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.config import CUDAGraphMode
from vllm.plugins.steering.seam import Stock, declare, wrap
from vllm.v1.worker.steering_idle_graphs import IdleBatchDescriptor

if TYPE_CHECKING:
    from vllm.forward_context import BatchDescriptor
    from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher

DISPATCHER = "vllm.v1.cudagraph_dispatcher:CudagraphDispatcher"


def install() -> None:
    """Give the dispatcher twins, where it has `idle_graphs`."""
    declare(DISPATCHER, "idle_graphs")
    keys = ("self", "cudagraph_mode", "uniform_decode_query_len")
    wrap(f"{DISPATCHER}.initialize_cudagraph_keys", keys, _initialize)
    wrap(f"{DISPATCHER}.get_capture_descs", ("self",), _get_capture_descs)
    asked = ("self", "num_tokens", "uniform_decode", "has_lora", "num_active_loras")
    wrap(f"{DISPATCHER}.dispatch", (*asked, "valid_modes", "invalid_modes"), _dispatch)


def _initialize(stock: Stock) -> Stock:
    def initialize_cudagraph_keys(
        self: CudagraphDispatcher, *args: object, **kwargs: object
    ) -> None:
        stock(self, *args, **kwargs)
        if self.idle_graphs is not None:
            for keys in self.cudagraph_keys.values():
                keys.update([IdleBatchDescriptor.of(desc) for desc in keys])

    return initialize_cudagraph_keys


def _get_capture_descs(stock: Stock) -> Stock:
    def get_capture_descs(
        self: CudagraphDispatcher,
    ) -> list[tuple[CUDAGraphMode, list[BatchDescriptor]]]:
        """Of each mode the twins last, largest first, as the graphs before them.

        vLLM estimates the memory of a mode's graphs from its first two. These are two
        of the larger kind, so the estimate covers the twins.
        """
        groups = stock(self)
        for _, descs in groups:
            descs.sort(key=lambda desc: isinstance(desc, IdleBatchDescriptor))
        return groups

    return get_capture_descs


def _dispatch(stock: Stock) -> Stock:
    def dispatch(
        self: CudagraphDispatcher, *args: object, **kwargs: object
    ) -> tuple[CUDAGraphMode, BatchDescriptor]:
        mode, desc = stock(self, *args, **kwargs)
        graphs = self.idle_graphs
        if graphs is None or mode is CUDAGraphMode.NONE or not graphs.chosen:
            return mode, desc
        twin = IdleBatchDescriptor.of(desc)
        return mode, twin if twin in self.cudagraph_keys[mode] else desc

    return dispatch
