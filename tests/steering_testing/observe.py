# SPDX-License-Identifier: Apache-2.0
"""Counts what an engine did, so that a test can check that it tested something."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import pytest

from vllm import LLM
from vllm.utils import jit_monitor

OWN_KERNELS = (
    "vllm.model_executor.layers.steering",
    "vllm.model_executor.layers.sae_",
)


@dataclass
class Steps:
    """Counts over the steps of an engine in this process.

    Attributes:
        graphs: how many steps ran in each CUDA graph mode; only with
            `cudagraph_metrics=True`.
        preempted: requests that lost their place.
        chunks: prompts that a step left unfinished.
        drafted, accepted: draft tokens.
    """

    graphs: Counter[str] = field(default_factory=Counter)
    preempted: int = 0
    chunks: int = 0
    drafted: int = 0
    accepted: int = 0

    def add(self, planned: Any, output: Any) -> None:
        """Count one step: the scheduler's plan, and the model runner's output."""
        if output.cudagraph_stats is not None:
            self.graphs[output.cudagraph_stats.runtime_mode] += 1
        self.preempted += len(planned.preempted_req_ids or ())
        sampled = output.sampled_token_ids
        for req_id in planned.num_scheduled_tokens:
            at = output.req_id_to_index.get(req_id)
            count = 0 if at is None or not sampled else len(sampled[at])
            drafts = len(planned.scheduled_spec_decode_tokens.get(req_id, ()))
            self.chunks += count == 0
            self.drafted += drafts
            self.accepted += min(max(count - 1, 0), drafts)


@contextmanager
def steps_of(llm: LLM) -> Iterator[Steps]:
    """Count the engine's steps within the block."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    stock, steps = scheduler.update_from_output, Steps()

    def update_from_output(planned: Any, output: Any) -> Any:
        steps.add(planned, output)
        return stock(planned, output)

    scheduler.update_from_output = update_from_output
    try:
        yield steps
    finally:
        del scheduler.update_from_output


def piecewise_graphs() -> WeakSet[Any]:
    """The compiled pieces of this process's models that were captured."""
    from vllm.compilation.cuda_graph import CUDAGraphWrapper
    from vllm.config import CUDAGraphMode

    return WeakSet(
        wrapper
        for wrapper in list(CUDAGraphWrapper._all_instances)
        if wrapper.runtime_mode is CUDAGraphMode.PIECEWISE
        and wrapper.concrete_cudagraph_entries
    )


class KernelWatch:
    """Notices when this project's Triton kernels compile, from its creation on.

    It starts with nothing compiled, so that an earlier engine of the process cannot
    hide a compilation. Call `serving` once the engine is up, and `assert_silent` at the
    end.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.heard: list[str] = []
        self.at_start: dict[str, int] = {}
        for kernel in self._kernels().values():
            kernel.device_caches.clear()
        # vLLM's own monitor calls this for every kernel that compiles while serving.
        monkeypatch.setattr(jit_monitor, "_handle_jit_event", self._hear)

    def _hear(self, *, fn_name: str, **event: Any) -> None:
        self.heard.append(fn_name)

    @staticmethod
    def _kernels() -> dict[str, Any]:
        modules = [m for name, m in sys.modules.items() if name.startswith(OWN_KERNELS)]
        return {
            name: value
            for module in modules
            for name, value in vars(module).items()
            if hasattr(value, "device_caches")
        }

    def _compiled(self) -> dict[str, int]:
        return {
            name: sum(len(caches[0]) for caches in kernel.device_caches.values())
            for name, kernel in self._kernels().items()
        }

    def serving(self) -> None:
        """From now on nothing may compile."""
        self.at_start = self._compiled()
        assert sum(self.at_start.values()) > 0, "no kernel compiled at start-up"
        self.heard.clear()

    def assert_silent(self) -> None:
        assert self._compiled() == self.at_start
        assert not set(self.heard) & set(self.at_start)
