# SPDX-License-Identifier: Apache-2.0
"""Seam into `vllm.v1.engine.output_processor`: a refused request says why.

The edit a branch would make: `process_outputs` puts the refusal into the queue of a
request that the engine core has refused for its steering, and aborts the other samples
of its prompt. Servers answer 409 then; without it they answer 500 and give no reason.
A client without queues finds the reason in `stop_reason`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm.plugins.steering.seam import Stock, wrap
from vllm.v1.engine.steering_refusals import refusal_in

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutput
    from vllm.v1.engine.output_processor import OutputProcessor, OutputProcessorOutput

MODULE = "vllm.v1.engine.output_processor"
PARAMETERS = (
    "self",
    "engine_core_outputs",
    "engine_core_timestamp",
    "iteration_stats",
    "weight_version",
)


def install() -> None:
    """Hand refusals to the requests that they concern."""
    wrap(f"{MODULE}:OutputProcessor.process_outputs", PARAMETERS, _make)


def _make(stock: Stock) -> Stock:
    def process_outputs(
        self: OutputProcessor,
        engine_core_outputs: Sequence[EngineCoreOutput],
        *args: object,
        **kwargs: object,
    ) -> OutputProcessorOutput:
        refused = [
            (state, refusal)
            for output in engine_core_outputs
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
        return result

    return process_outputs
