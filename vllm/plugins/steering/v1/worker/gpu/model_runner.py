# SPDX-License-Identifier: Apache-2.0
"""Seam into `vllm.v1.worker.gpu.model_runner` (Model Runner V2).

The edit a branch would make: `GPUModelRunner` inherits `SteeringModelRunnerV2Mixin`,
and

- `load_model` ends with `self.load_steering()`,
- `reload_weights` does its work in `self.reload_under_steering(...)`,
- `finish_requests` ends with `self.finish_steering_requests(scheduler_output)`,
- `add_requests` ends with `self.add_steering_requests(scheduler_output)`,
- `prepare_inputs` ends with `self.prepare_steering(input_batch)`,
- `sample_tokens` begins with `readout = self.take_steering_readout()` and puts it into
  the `ModelRunnerOutput` that it makes,
- `_dummy_run` and `capture_model` begin with `self.clear_steering_step()`, and
  `capture_model` goes on with `self.give_idle_graphs()`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.plugins.steering.seam import Stock, resolve, wrap
from vllm.plugins.steering.v1.worker.gpu_model_runner import (
    dummy_run,
    load_model,
    reload_weights,
)

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

RUNNER = "vllm.v1.worker.gpu.model_runner:GPUModelRunner"
DUMMY_RUN = (
    "self",
    "num_tokens",
    "args",
    "skip_attn",
    "uniform_decode",
    "context_len",
    "skip_eplb",
    "is_profile",
    "valid_dummy_state_slots",
    "randomize_inputs",
    "kwargs",
)


def install() -> None:
    """Give the V2 runner the mixin and call it at the runner's own verbs."""
    from vllm.v1.worker.steering_model_runner_mixin import SteeringModelRunnerV2Mixin

    _, _, runner = resolve(RUNNER)
    if SteeringModelRunnerV2Mixin not in runner.__bases__:
        runner.__bases__ = (*runner.__bases__, SteeringModelRunnerV2Mixin)
    loads = ("self", "load_dummy_weights", "args")
    # Since 0.32, and before.
    known = [(*loads, "model", "kwargs"), (*loads, "kwargs")]
    wrap(f"{RUNNER}.load_model", known, load_model)
    source = ("self", "weights_iterator", "weights_path", "is_checkpoint_format")
    # Before 0.32, it calls the V1 runner's.
    known = [source, ("self", "args", "kwargs")]
    wrap(f"{RUNNER}.reload_weights", known, reload_weights)
    scheduled = ("self", "scheduler_output")
    wrap(f"{RUNNER}.finish_requests", scheduled, finish_requests)
    wrap(f"{RUNNER}.add_requests", scheduled, add_requests)
    inputs = (*scheduled, "batch_req_state", "batch_desc", "num_active_loras")
    wrap(f"{RUNNER}.prepare_inputs", inputs, prepare_inputs)
    wrap(f"{RUNNER}.sample_tokens", ("self", "grammar_output"), sample_tokens)
    wrap(f"{RUNNER}._dummy_run", DUMMY_RUN, dummy_run)
    wrap(f"{RUNNER}.capture_model", ("self", "profile_only"), capture_model)


def finish_requests(stock: Stock) -> Stock:
    def finish_requests(
        self: GPUModelRunner, scheduler_output: SchedulerOutput
    ) -> None:
        stock(self, scheduler_output)
        self.finish_steering_requests(scheduler_output)

    return finish_requests


def add_requests(stock: Stock) -> Stock:
    def add_requests(self: GPUModelRunner, scheduler_output: SchedulerOutput) -> None:
        stock(self, scheduler_output)
        self.add_steering_requests(scheduler_output)

    return add_requests


def prepare_inputs(stock: Stock) -> Stock:
    def prepare_inputs(self: GPUModelRunner, *args: object, **kwargs: object) -> object:
        batch = stock(self, *args, **kwargs)
        self.prepare_steering(batch)
        return batch

    return prepare_inputs


def capture_model(stock: Stock) -> Stock:
    def capture_model(self: GPUModelRunner, *args: object, **kwargs: object) -> object:
        self.clear_steering_step()
        self.give_idle_graphs()
        return stock(self, *args, **kwargs)

    return capture_model


def sample_tokens(stock: Stock) -> Stock:
    from vllm.v1.worker.gpu.async_utils import AsyncOutput

    def sample_tokens(self: GPUModelRunner, grammar_output: object) -> object:
        readout = self.take_steering_readout()
        output = stock(self, grammar_output)
        if isinstance(output, AsyncOutput):
            self.attach_steering_readout(output.model_runner_output, readout)
        return output

    return sample_tokens
