# SPDX-License-Identifier: Apache-2.0
"""Seam into `vllm.v1.worker.worker_base`.

A branch needs no edit here, because its runners inherit the mixin in their own files
and its `WorkerBase` inherits `SteeringWorkerMixin`. An overlay must change the runner
classes in every worker process before the worker makes its runner, and only when
steering is configured. The worker class gets its mixins as it would get a
`worker_extension_cls`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.config.steering import get_steering_config
from vllm.model_executor.layers.steering_capture import idle_graphs_are_on
from vllm.plugins.steering.seam import Stock, wrap

if TYPE_CHECKING:
    from vllm.v1.worker.worker_base import WorkerWrapperBase


def install() -> None:
    """Have a worker bind its runner's seams just before it makes the runner."""
    wrap("vllm.v1.worker.worker_base:WorkerWrapperBase.init_device", ("self",), _make)


def _make(stock: Stock) -> Stock:
    def init_device(self: WorkerWrapperBase) -> object:
        if get_steering_config(self.vllm_config.additional_config) is not None:
            install_runner_seams(self.vllm_config.use_v2_model_runner)
            extend_worker(type(self.worker))
        return stock(self)

    return init_device


def extend_worker(worker: type) -> None:
    """Give the worker's class the methods that change modules and measure sites."""
    from vllm.v1.worker.steering_measure import SteeringMeasureMixin
    from vllm.v1.worker.steering_module_changes import SteeringWorkerMixin

    for mixin in (SteeringWorkerMixin, SteeringMeasureMixin):
        if not issubclass(worker, mixin):
            worker.__bases__ = (*worker.__bases__, mixin)


def install_runner_seams(use_v2_model_runner: bool) -> None:
    """Bind the seams of the runner that this worker will use."""
    has_twins = idle_graphs_are_on()
    if use_v2_model_runner:
        from vllm.plugins.steering.v1.worker.gpu import cudagraph_utils, model_runner

        model_runner.install()
        if has_twins:
            cudagraph_utils.install()
    else:
        from vllm.plugins.steering.v1.worker import gpu_model_runner

        gpu_model_runner.install()
        if has_twins:
            gpu_model_runner.install_idle_graphs()
