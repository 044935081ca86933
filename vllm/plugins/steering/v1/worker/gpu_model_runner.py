# SPDX-License-Identifier: Apache-2.0
"""Seam into `vllm.v1.worker.gpu_model_runner` (V1; the CPU runner inherits it).

The edit a branch would make: `GPUModelRunner` inherits `SteeringModelRunnerV1Mixin`,
and

- `load_model` ends with `self.load_steering()` (in `CPUModelRunner` too),
- `reload_weights` does its work in `self.reload_under_steering(...)`,
- `_update_states` ends with `self.update_steering_requests(scheduler_output)`,
- `_prepare_inputs` ends with `self.prepare_steering(num_scheduled_tokens)`,
- `sample_tokens` begins with `readout = self.take_steering_readout()` and puts it into
  the `ModelRunnerOutput` that it makes,
- `_dummy_run` begins with `self.clear_steering_step()`,
- with `VLLM_STEERING_IDLE_GRAPHS=1`, `_warmup_and_capture` captures the graph or its
  twin, whichever the descriptor is of.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vllm.platforms import current_platform
from vllm.plugins.steering.seam import Stock, resolve, wrap
from vllm.v1.worker.steering_idle_graphs import IdleBatchDescriptor

if TYPE_CHECKING:
    import numpy as np

    from vllm.forward_context import BatchDescriptor
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
CPU_RUNNER = "vllm.v1.worker.cpu_model_runner:CPUModelRunner"
DUMMY_RUN = (
    "self",
    "num_tokens",
    "cudagraph_runtime_mode",
    "force_attention",
    "uniform_decode",
    "allow_microbatching",
    "skip_eplb",
    "is_profile",
    "create_mixed_batch",
    "remove_lora",
    "is_graph_capturing",
    "num_active_loras",
    "profile_seq_lens",
    "randomize_inputs",
)


def install() -> None:
    """Give the V1 runner the mixin and call it at the runner's own verbs."""
    from vllm.v1.worker.steering_model_runner_mixin import SteeringModelRunnerV1Mixin

    _, _, runner = resolve(RUNNER)
    if SteeringModelRunnerV1Mixin not in runner.__bases__:
        runner.__bases__ = (*runner.__bases__, SteeringModelRunnerV1Mixin)
    loads = ("self", "load_dummy_weights")
    # Since 0.32, and before.
    wrap(f"{RUNNER}.load_model", [(*loads, "model"), loads], load_model)
    if current_platform.is_cpu():
        wrap(f"{CPU_RUNNER}.load_model", loads, load_model)
    source = ("self", "weights_iterator", "weights_path", "is_checkpoint_format")
    wrap(f"{RUNNER}.reload_weights", source, reload_weights)
    states = ("self", "scheduler_output")
    wrap(f"{RUNNER}._update_states", states, update_states)
    inputs = ("self", "scheduler_output", "num_scheduled_tokens")
    wrap(f"{RUNNER}._prepare_inputs", inputs, prepare_inputs)
    wrap(f"{RUNNER}.sample_tokens", ("self", "grammar_output"), sample_tokens)
    wrap(f"{RUNNER}._dummy_run", DUMMY_RUN, dummy_run)


def install_idle_graphs() -> None:
    """Have each graph captured twice, the second time without steering."""
    from vllm.plugins.steering.v1 import cudagraph_dispatcher

    cudagraph_dispatcher.install()
    captures = ("self", "desc", "cudagraph_runtime_mode", "profile_seq_lens")
    options = ("allow_microbatching", "num_warmups", "profiler")
    target = f"{RUNNER}._warmup_and_capture"
    wrap(target, (*captures, *options), warmup_and_capture)


def load_model(stock: Stock) -> Stock:
    def load_model(self: GPUModelRunner, *args: object, **kwargs: object) -> None:
        stock(self, *args, **kwargs)
        self.load_steering()

    return load_model


def reload_weights(stock: Stock) -> Stock:
    def reload_weights(self: GPUModelRunner, *args: object, **kwargs: object) -> None:
        self.reload_under_steering(lambda: stock(self, *args, **kwargs))

    return reload_weights


def update_states(stock: Stock) -> Stock:
    def _update_states(
        self: GPUModelRunner, scheduler_output: SchedulerOutput
    ) -> object:
        corrections = stock(self, scheduler_output)
        self.update_steering_requests(scheduler_output)
        return corrections

    return _update_states


def prepare_inputs(stock: Stock) -> Stock:
    def _prepare_inputs(
        self: GPUModelRunner,
        scheduler_output: SchedulerOutput,
        num_scheduled_tokens: np.ndarray,
    ) -> object:
        prepared = stock(self, scheduler_output, num_scheduled_tokens)
        self.prepare_steering(num_scheduled_tokens)
        return prepared

    return _prepare_inputs


def sample_tokens(stock: Stock) -> Stock:
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.worker.gpu_model_runner import AsyncGPUModelRunnerOutput

    def sample_tokens(self: GPUModelRunner, grammar_output: object) -> object:
        readout = self.take_steering_readout()
        output = stock(self, grammar_output)
        if isinstance(output, AsyncGPUModelRunnerOutput):
            self.attach_steering_readout(output._model_runner_output, readout)
        elif isinstance(output, ModelRunnerOutput):
            self.attach_steering_readout(output, readout)
        return output

    return sample_tokens


def dummy_run(stock: Stock) -> Stock:
    def _dummy_run(self: GPUModelRunner, *args: object, **kwargs: object) -> object:
        self.clear_steering_step()
        return stock(self, *args, **kwargs)

    return _dummy_run


def warmup_and_capture(stock: Stock) -> Stock:
    def _warmup_and_capture(
        self: GPUModelRunner, desc: BatchDescriptor, *args: object, **kwargs: object
    ) -> None:
        graphs = self.cudagraph_dispatcher.idle_graphs
        if graphs is None:
            return stock(self, desc, *args, **kwargs)
        is_twin = isinstance(desc, IdleBatchDescriptor)
        with graphs.capture(is_twin), drafter_graphs(self, not is_twin):
            stock(self, desc, *args, **kwargs)

    return _warmup_and_capture


@contextmanager
def drafter_graphs(runner: GPUModelRunner, used: bool) -> Iterator[None]:
    """Whether the drafter captures and replays graphs within the block.

    It captures its own beside those of the model. vLLM does not let it replay them
    while a second graph of the same batch is captured: with LoRA, that has ended in an
    illegal memory access (vllm-project/vllm, pull request 28318).
    """
    from vllm.v1.spec_decode.extract_hidden_states import ExtractHiddenStatesProposer
    from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer

    drafter = vars(runner).get("drafter")
    known = (ExtractHiddenStatesProposer, SpecDecodeBaseProposer)
    if used or not isinstance(drafter, known):
        yield
        return
    dispatcher = drafter.cudagraph_dispatcher
    had = dispatcher.keys_initialized
    dispatcher.keys_initialized = False
    try:
        yield
    finally:
        dispatcher.keys_initialized = had
