# SPDX-License-Identifier: Apache-2.0
"""What a model runner does for steering: its own methods call the runtime's.

The two runners differ only in how they report new and finished requests, and in the
`BatchView` of a step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from vllm.config import VllmConfig
from vllm.config.sae_readout_step import READOUT_ATTRIBUTE, StepReadout
from vllm.config.steering import get_steering_config
from vllm.config.steering_private_directory import start_up_failure
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.v1.worker.steering_decoder_layer import try_unknown_layers
from vllm.v1.worker.steering_embeds import embedded_positions
from vllm.v1.worker.steering_idle_graphs import ranks_want_idle_graphs
from vllm.v1.worker.steering_index import BatchView
from vllm.v1.worker.steering_reload import (
    fold_again,
    refuse_changed_files,
    sites_out_of,
)
from vllm.v1.worker.steering_runtime import SteeringRuntime
from vllm.v1.worker.steering_shape import SteeringShape

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.worker.gpu.input_batch import InputBatch

logger = init_logger(__name__)


class SteeringModelRunnerMixin:
    """Adds steering to a model runner; without a configuration it does nothing."""

    vllm_config: VllmConfig
    device: torch.device
    steering: SteeringRuntime | None = None

    def get_model(self) -> nn.Module:
        raise NotImplementedError

    def load_steering(self) -> None:
        """Attach the configured modules to the model that was just loaded.

        Raises:
            SteeringConfigError: a module cannot be loaded, or does not fit the model.
        """
        config = get_steering_config(self.vllm_config.additional_config)
        if config is None:
            return
        shape = SteeringShape.of_worker(self.vllm_config, config, self.device)
        try:
            if config.decoder_layer == "auto":
                try_unknown_layers(self.get_model(), self.vllm_config, self.device)
            self.steering = SteeringRuntime(
                config,
                self.get_model(),
                shape,
                sends_output=get_tensor_model_parallel_rank() == 0,
                has_idle_graphs=ranks_want_idle_graphs(),
            )
        except ValueError as error:
            raise start_up_failure(error) from None
        context = self.vllm_config.compilation_config.static_forward_context
        for key, site in self.steering.modules.sites.items():
            context[key.name] = site
        self.give_idle_graphs()

    def reload_under_steering(self, reload: Callable[[], None]) -> None:
        """Load new weights of the model. The modules do not change.

        Raises:
            ValueError: as `refuse_changed_files`, before anything is loaded, or
                `fold_again`.
        """
        if self.steering is None:
            return reload()
        modules = self.steering.config.modules.values()
        refuse_changed_files(modules)
        with sites_out_of(self.get_model()):
            reload()
        fold_again(self.steering.modules, modules)

    def clear_steering_step(self) -> None:
        """Give every token row 0: dummy runs, profiling and capture steer nothing."""
        if self.steering is not None:
            self.steering.clear_step()

    def use_steering_graphs(self, used: bool) -> None:
        """Set whether the next steps replay CUDA graphs. A replay calls no op of a
        site, so measurements turn replay off."""
        raise NotImplementedError

    def give_idle_graphs(self) -> None:
        """Let the graphs that are captured next have twins (see `IdleGraphs`)."""
        raise NotImplementedError

    def take_steering_readout(self) -> StepReadout | None:
        """What this step has read. Its copy to the host is under way."""
        return None if self.steering is None else self.steering.readout.take_step()

    @staticmethod
    def attach_steering_readout(
        output: ModelRunnerOutput, readout: StepReadout | None
    ) -> None:
        """Send what was read with the step's output.

        Its arrays are complete when the output is complete, because on the device their
        copies precede those of the sampled tokens.
        """
        if readout is not None:
            setattr(output, READOUT_ATTRIBUTE, readout)


class SteeringModelRunnerV1Mixin(SteeringModelRunnerMixin):
    """Model Runner V1: a persistent batch that requests leave and return to."""

    _steering_batch: list[str] = []  # as of the step before
    _had_graphs: bool | None = None  # while they are not used

    def use_steering_graphs(self, used: bool) -> None:
        """See the base class."""
        dispatcher = self.cudagraph_dispatcher  # type: ignore[attr-defined]
        if self._had_graphs is None:
            self._had_graphs = dispatcher.keys_initialized
        dispatcher.keys_initialized = used and self._had_graphs
        if used:
            self._had_graphs = None

    def give_idle_graphs(self) -> None:
        """See the base class. This runner tells microbatched graphs apart by their
        number of tokens alone, so with microbatches there are no twins."""
        graphs = None if self.steering is None else self.steering.idle_graphs
        if graphs is None:
            return
        if self.vllm_config.parallel_config.use_ubatching:
            logger.warning("Steering: no graphs for idle steps with microbatches")
            return
        self.cudagraph_dispatcher.idle_graphs = graphs  # type: ignore[attr-defined]

    def update_steering_requests(self, scheduler_output: SchedulerOutput) -> None:
        """Follow the persistent batch after `_update_states`."""
        steering = self.steering
        if steering is None:
            return
        for req_id in scheduler_output.finished_req_ids:
            steering.remove_request(req_id)
        batch = self.input_batch  # type: ignore[attr-defined]
        stays = batch.req_ids == self._steering_batch
        present = batch.req_id_to_index
        for req_id in () if stays else steering.holding:
            if req_id not in present:
                steering.park_request(req_id)
        for new in scheduler_output.scheduled_new_reqs:
            embedded = embedded_positions(new)
            steering.add_request(new.req_id, new.sampling_params, embedded)
        for req_id in () if stays else steering.parked:
            if req_id in present:
                steering.resume_request(req_id)
        self._steering_batch = list(batch.req_ids)

    def prepare_steering(self, num_scheduled_tokens: np.ndarray) -> None:
        """Write the step's index after `_prepare_inputs`."""
        if self.steering is None:
            return
        batch = self.input_batch  # type: ignore[attr-defined]
        n = batch.num_reqs
        view = BatchView(
            req_ids=batch.req_ids[:n],
            num_scheduled=num_scheduled_tokens[:n],
            num_computed=batch.num_computed_tokens_cpu[:n],
            prompt_len=batch.num_prompt_tokens[:n],
            token_ids=self.input_ids.gpu,  # type: ignore[attr-defined]
        )
        self.steering.prepare_step(view)


class SteeringModelRunnerV2Mixin(SteeringModelRunnerMixin):
    """Model Runner V2: preempted requests give up their slots, as finished ones do."""

    _had_graphs: bool | None = None  # while they are not used

    def use_steering_graphs(self, used: bool) -> None:
        """See the base class."""
        manager = self.cudagraph_manager  # type: ignore[attr-defined]
        if manager is None:
            return
        if self._had_graphs is None:
            self._had_graphs = manager._graphs_captured
        manager._graphs_captured = used and self._had_graphs
        if used:
            self._had_graphs = None

    def give_idle_graphs(self) -> None:
        """See the base class. The manager is made after the model is loaded."""
        manager = self.cudagraph_manager  # type: ignore[attr-defined]
        if manager is not None and self.steering is not None:
            manager.idle_graphs = self.steering.idle_graphs

    def finish_steering_requests(self, scheduler_output: SchedulerOutput) -> None:
        """Follow `finish_requests`."""
        if self.steering is None:
            return
        for req_id in scheduler_output.finished_req_ids:
            self.steering.remove_request(req_id)
        for req_id in scheduler_output.preempted_req_ids or ():
            self.steering.remove_request(req_id)

    def add_steering_requests(self, scheduler_output: SchedulerOutput) -> None:
        """Follow `add_requests`: new requests, and preempted ones that return."""
        if self.steering is None:
            return
        for new in scheduler_output.scheduled_new_reqs:
            embedded = embedded_positions(new)
            self.steering.add_request(new.req_id, new.sampling_params, embedded)

    def prepare_steering(self, batch: InputBatch) -> None:
        """Write the step's index after `prepare_inputs`."""
        if self.steering is None:
            return
        states = self.req_states  # type: ignore[attr-defined]
        view = BatchView(
            req_ids=batch.req_ids,
            num_scheduled=batch.num_scheduled_tokens,
            num_computed=batch.num_computed_tokens_np,
            prompt_len=states.prompt_len.np[batch.idx_mapping_np],
            token_ids=batch.input_ids,
        )
        self.steering.prepare_step(view)
