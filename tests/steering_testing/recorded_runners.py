# SPDX-License-Identifier: Apache-2.0
"""What each model runner does with CUDA graphs, on recorded ones."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from steering_testing.recorded_graphs import Graph, Model, small_config

from vllm.compilation.cuda_graph import CUDAGraphWrapper
from vllm.config import CUDAGraphMode
from vllm.forward_context import BatchDescriptor, set_forward_context
from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher
from vllm.v1.worker.gpu import cudagraph_utils
from vllm.v1.worker.gpu.cudagraph_utils import (
    BatchExecutionDescriptor,
    CudaGraphManager,
)
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.steering_idle_graphs import IdleGraphs

FULL, PIECEWISE = CUDAGraphMode.FULL, CUDAGraphMode.PIECEWISE


class Decision:
    """Whether the step at hand is idle."""

    def __init__(self) -> None:
        self.idle = False

    def __call__(self) -> bool:
        return self.idle


class FirstRunner:
    """What the V1 runner does with graphs: capture, then steps."""

    def __init__(self, mode: CUDAGraphMode, has_twins: bool = True):
        config = small_config()
        self.config, self.model = config, Model(config)
        self.decision = Decision()
        self.dispatcher = CudagraphDispatcher(config)
        if has_twins:
            step = self.model.step
            self.dispatcher.idle_graphs = IdleGraphs(step, self.decision)
        self.dispatcher.initialize_cudagraph_keys(mode)
        self.runner: Any = object.__new__(GPUModelRunner)
        self.runner.cudagraph_dispatcher = self.dispatcher
        self.runner.compilation_config = config.compilation_config
        self.runner._dummy_run = self.forward
        self.wrapper = CUDAGraphWrapper(self.model, config, FULL)

    def capture(self) -> None:
        for mode, descs in self.dispatcher.get_capture_descs():
            for desc in descs:
                self.runner._warmup_and_capture(desc, cudagraph_runtime_mode=mode)

    def forward(
        self,
        num_tokens: int,
        cudagraph_runtime_mode: CUDAGraphMode | None = None,
        uniform_decode: bool = False,
        **options: Any,
    ) -> BatchDescriptor:
        """A dummy run, or a step: dispatch and forward."""
        is_eager = cudagraph_runtime_mode is CUDAGraphMode.NONE
        mode, desc = self.dispatcher.dispatch(
            num_tokens,
            uniform_decode,
            valid_modes={CUDAGraphMode.NONE} if is_eager else None,
        )
        assert cudagraph_runtime_mode in (None, mode)
        with set_forward_context(
            None, self.config, cudagraph_runtime_mode=mode, batch_descriptor=desc
        ):
            self.wrapper(desc.num_tokens)
        return desc

    def graphs(self) -> dict[tuple[CUDAGraphMode, BatchDescriptor], Graph]:
        return {
            (wrapper.runtime_mode, desc): entry.cudagraph
            for wrapper in (self.wrapper, self.model.piece)
            for desc, entry in wrapper.concrete_cudagraph_entries.items()
        }


class SecondRunner:
    """What the V2 runner does with graphs: capture, then steps."""

    def __init__(
        self, mode: CUDAGraphMode, patch: pytest.MonkeyPatch, has_twins: bool = True
    ):
        stage = SimpleNamespace(is_first_rank=True, is_last_rank=True)
        patch.setattr(cudagraph_utils, "get_pp_group", lambda: stage)
        self.config = small_config()
        self.model, self.decision = Model(self.config), Decision()
        device = torch.device("cpu")
        self.manager = CudaGraphManager(self.config, device, mode, decode_query_len=1)
        if has_twins:
            step = self.model.step
            self.manager.idle_graphs = IdleGraphs(step, self.decision)

    def create(
        self, desc: BatchExecutionDescriptor, warmup: bool
    ) -> Callable[[CUDAGraphMode], None]:
        def forward(mode: CUDAGraphMode) -> None:
            self.run(desc, mode)

        return forward

    def run(self, desc: BatchExecutionDescriptor, mode: CUDAGraphMode) -> None:
        key = BatchDescriptor(desc.num_tokens) if mode is PIECEWISE else None
        inputs = {"num_tokens": desc.num_tokens}
        with set_forward_context(
            None, self.config, cudagraph_runtime_mode=mode, batch_descriptor=key
        ):
            if mode is PIECEWISE:
                self.manager.run_pw_graph(self.model, inputs)
            else:
                self.model(**inputs)

    def capture(self) -> None:
        self.manager.capture(self.create)

    def dispatch(self, num_tokens: int, uniform: bool) -> BatchExecutionDescriptor:
        return self.manager.dispatch(num_tokens, num_tokens, int(uniform) or None, 0)

    def step(self, num_tokens: int, uniform: bool) -> None:
        desc = self.dispatch(num_tokens, uniform)
        if desc.cg_mode is FULL:
            self.manager.run_fullgraph(desc)
        else:
            self.run(desc, desc.cg_mode)
