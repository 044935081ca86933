# SPDX-License-Identifier: Apache-2.0
"""Seam into `vllm.v1.engine.output_processor`: refusals, and what requests have read.

The edits a branch would make: `RequestState` keeps `Readings` as it keeps
log-probabilities (here the state of a request that reads is made an instance of a
subclass, and that of any other is stock's). `process_outputs` puts the refusal into the
queue of a request that the engine core has refused for its steering, and aborts the
other samples of its prompt. Servers answer 409 then; without it they answer 500 and
give no reason. A client without queues finds the reason in `stop_reason`. Streams that
read and that nobody takes are ended in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm.plugins.steering.seam import (
    Signatures,
    Stock,
    check_signature,
    declare,
    resolve,
    wrap,
)
from vllm.v1.engine.steering_read_log import ReadLog
from vllm.v1.engine.steering_read_states import (
    end_unread,
    follow,
    keep_last_tokens,
    take_steps,
)
from vllm.v1.engine.steering_refusals import refusal_in

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
    from vllm.v1.engine.output_processor import OutputProcessor, OutputProcessorOutput

MODULE = "vllm.v1.engine.output_processor"
_OUTPUTS = ("self", "engine_core_outputs", "engine_core_timestamp", "iteration_stats")
PARAMETERS: Signatures = [(*_OUTPUTS, "weight_version"), _OUTPUTS]  # since 0.32; before
# Methods of `RequestState` that the state of a reading request overrides.
_REQUEST_OUTPUT = (
    "self",
    "external_req_id",
    "outputs",
    "finished",
    "kv_transfer_params",
    "ec_transfer_params",
)
OVERRIDDEN: dict[str, Signatures] = {
    "_new_completion_output": ("self", "token_ids", "finish_reason", "stop_reason"),
    "_new_request_output": [  # Since 0.32, and before.
        (*_REQUEST_OUTPUT, "error"),
        _REQUEST_OUTPUT,
    ],
}


def install() -> None:
    """Hand refusals and what was read to the requests that they concern."""
    declare(f"{MODULE}:OutputProcessor", "sae_read_log")
    added = ("self", "request", "prompt", "parent_req", "request_index", "queue")
    wrap(f"{MODULE}:OutputProcessor.add_request", added, _make_add_request)
    for method, parameters in OVERRIDDEN.items():
        target = f"{MODULE}:RequestState.{method}"
        check_signature(target, resolve(target)[2], parameters)
    wrap(f"{MODULE}:OutputProcessor.process_outputs", PARAMETERS, _make)


def read_log(processor: OutputProcessor) -> ReadLog:
    """What the engine's last steps have read."""
    if processor.sae_read_log is None:
        processor.sae_read_log = ReadLog()
    return processor.sae_read_log


def _make_add_request(stock: Stock) -> Stock:
    def add_request(
        self: OutputProcessor,
        request: EngineCoreRequest,
        *args: object,
        **kwargs: object,
    ) -> None:
        stock(self, request, *args, **kwargs)
        follow(read_log(self), self.request_states, request)

    return add_request


def _make(stock: Stock) -> Stock:
    def process_outputs(
        self: OutputProcessor,
        engine_core_outputs: Sequence[EngineCoreOutput],
        *args: object,
        **kwargs: object,
    ) -> OutputProcessorOutput:
        ended = [one for one in engine_core_outputs if one.stop_reason is not None]
        if self.sae_read_log is not None:
            take_steps(self.sae_read_log, engine_core_outputs)
            keep_last_tokens(self.request_states, ended)
        refused = [
            (state, refusal)
            for output in ended
            if (refusal := refusal_in(output.stop_reason)) is not None
            and (state := self.request_states.get(output.request_id)) is not None
        ]
        result = stock(self, engine_core_outputs, *args, **kwargs)
        for state, refusal in refused:
            if state.queue is None:
                continue
            state.queue.put(refusal)
            if state.parent_req is not None:
                samples = list(state.parent_req.child_requests)
                result.reqs_to_abort += self.abort_requests(samples, internal=True)
        if self.sae_read_log is not None and self.sae_read_log.unread:
            result.reqs_to_abort += end_unread(self, self.sae_read_log)
        return result

    return process_outputs
