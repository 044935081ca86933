# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs on a CPU: a capture records what a site launches, a replay is noted.

vLLM's own wrappers, dispatchers and managers run on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from steering_testing.sites import (
    CPU,
    MAX_CLAMPS,
    ROWS,
    bench,
    exact_sae,
    load_slot,
    steer_every_tier,
)
from torch import nn

from vllm.compilation import cuda_graph
from vllm.compilation.cuda_graph import CUDAGraphWrapper
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.model_executor.layers import (
    sae_full_reconstruction,  # noqa: F401
    sae_steering,  # noqa: F401
    steering_capture,
    steering_reference,
    steering_reference_backend,
)
from vllm.model_executor.layers.steering import apply_layer_steering
from vllm.model_executor.layers.steering_read_state import ReadBuffers
from vllm.platforms import current_platform
from vllm.v1.worker.gpu import cudagraph_utils

SIZES = [1, 2, 4, 8]
WIDTH, FEATURES = 8, 20
# In the order of a site.
EVERY_LAUNCH = [
    "steering_vectors",
    "sae_clamp",
    "read_features",
    "full_reconstruction",
]


class Graph:
    """What was launched while it was captured."""

    def __init__(self, recorder: Recorder):
        self.launches: list[str] = []
        self._recorder = recorder

    def replay(self) -> None:
        self._recorder.replayed.append(self)


class Recorder:
    """Captures and replays of a test.

    Attributes:
        replayed: graphs, in order.
        launches: outside of any capture.
    """

    def __init__(self) -> None:
        self.replayed: list[Graph] = []
        self.launches: list[str] = []
        self._current: Graph | None = None

    @property
    def captures(self) -> bool:
        return self._current is not None

    def launch(self, name: str, stock: Callable[..., Any]) -> Callable[..., Any]:
        def launched(*args: Any) -> None:
            (self._current or self).launches.append(name)
            stock(*args)

        return launched

    @contextmanager
    def capture(self, graph: Graph, *args: Any, **kwargs: Any) -> Iterator[None]:
        self._current = graph
        try:
            yield
        finally:
            self._current = None


def record_graphs(patch: pytest.MonkeyPatch) -> Recorder:
    """Replace CUDA's graphs, streams and pools for the length of a test."""
    recorder = Recorder()
    patch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(recorder))
    patch.setattr(torch.cuda, "graph", recorder.capture)
    patch.setattr(torch.accelerator, "synchronize", lambda: None)
    patch.setattr(type(current_platform), "get_global_graph_pool", lambda self: None)
    patch.setattr(cuda_graph, "weak_ref_tensors", lambda tensors: tensors)
    patch.setattr(cuda_graph, "validate_cudagraph_capturing_enabled", lambda: None)
    patch.setattr(cudagraph_utils, "graph_capture", lambda device: nullcontext())
    patch.setattr(cudagraph_utils, "is_global_first_rank", lambda: False)
    for module in (cuda_graph, cudagraph_utils):
        patch.setattr(module, "current_stream", lambda: None)
        patch.setattr(module, "capture_pool", lambda pool, config: nullcontext())
    patch.setattr(steering_capture, "is_captured", lambda device: recorder.captures)
    for module, name in (
        (steering_reference, "full_reconstruction"),
        (steering_reference, "sae_clamp"),
        (steering_reference, "steering_vectors"),
        (steering_reference_backend, "read_features"),
    ):
        patch.setattr(module, name, recorder.launch(name, getattr(module, name)))
    return recorder


class Model(nn.Module):
    """One site with every tier and reading, of which nothing is in use yet.

    The site is a piece of its own, as torch.compile cuts it, in PIECEWISE mode.
    """

    def __init__(self, config: VllmConfig):
        super().__init__()
        rng = np.random.default_rng(0)
        slot = load_slot(exact_sae(rng, FEATURES, WIDTH, "jumprelu"))
        slot.reads = ReadBuffers(ROWS, MAX_CLAMPS, SIZES[-1], FEATURES, CPU)
        made = bench(rng, SIZES[-1], WIDTH, [slot], steer_every_tier(slot, WIDTH))
        self.site, self.step = made.site, made.step
        for table in (slot.full, slot.delta, made.site.vectors.table):
            table.in_use = False
        self.hidden, self.residual = made.hidden, made.residual
        self.piece = CUDAGraphWrapper(self.run, config, CUDAGraphMode.PIECEWISE)
        names = config.compilation_config.static_forward_context
        names[self.site.name] = self.site

    def run(self, hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        apply_layer_steering(self.site, hidden, residual)
        return hidden

    def forward(self, num_tokens: int) -> torch.Tensor:
        return self.piece(self.hidden[:num_tokens], self.residual[:num_tokens])


def small_config() -> VllmConfig:
    """vLLM's configuration, with graphs of a few sizes."""
    config = VllmConfig()
    config.scheduler_config.max_num_seqs = SIZES[-1]
    compilation = config.compilation_config
    compilation.cudagraph_capture_sizes = list(SIZES)
    compilation.max_cudagraph_capture_size = SIZES[-1]
    compilation.cudagraph_mode = CUDAGraphMode.NONE  # until a test says otherwise
    return config
