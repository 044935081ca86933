# SPDX-License-Identifier: Apache-2.0
"""The front end's states of requests that read."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm.config.sae_steering_specs import READOUT_KEY
from vllm.config.steering_json import JsonView
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.steering_read_outputs import Readings
from vllm.v1.engine.steering_reads import PAYLOAD_KEY, STOP_PREFIX

if TYPE_CHECKING:
    from vllm.outputs import CompletionOutput, RequestOutput
    from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason


@functools.cache
def reading_state() -> type:
    """The subclass of `RequestState` for requests that read."""
    from vllm.v1.engine.output_processor import RequestState

    class ReadingRequestState(RequestState):
        readings: Readings

        def _new_completion_output(
            self,
            token_ids: list[int],
            finish_reason: FinishReason | None,
            stop_reason: int | str | None,
        ) -> CompletionOutput:
            output = super()._new_completion_output(
                token_ids, finish_reason, stop_reason
            )
            if finish_reason is not None:
                assert self.detokenizer is not None
                generated = self.detokenizer.num_output_tokens()
                self.readings.finish(generated, is_ours(stop_reason))
            output.sae_features = self.readings.take_output(self._is_delta())
            return output

        def _new_request_output(self, *args: object, **kwargs: object) -> RequestOutput:
            output = super()._new_request_output(*args, **kwargs)
            output.prompt_sae_features = self.readings.take_prompt(self._is_delta())
            return output

        def _is_delta(self) -> bool:
            return self.output_kind == RequestOutputKind.DELTA

    return ReadingRequestState


def is_ours(stop_reason: object) -> bool:
    """Whether a request ended because of a feature."""
    return isinstance(stop_reason, str) and stop_reason.startswith(STOP_PREFIX)


def follow(states: JsonView, request: EngineCoreRequest) -> None:
    """Have the state of a new request collect what it reads, if it does."""
    params = request.sampling_params
    if params is None or not params.extra_args:
        return
    if params.extra_args.get(READOUT_KEY):
        state = states[request.request_id]
        state.readings = Readings(params.extra_args, state.prompt_len)
        state.__class__ = reading_state()


def take_payloads(states: JsonView, outputs: Sequence[EngineCoreOutput]) -> None:
    """Move what was read from the engine's outputs to the states of their requests."""
    for output in outputs:
        params = output.ec_transfer_params
        if params is None or PAYLOAD_KEY not in params:
            continue
        payload = params.pop(PAYLOAD_KEY)
        output.ec_transfer_params = params or None
        state = states.get(output.request_id)
        if state is None:
            continue
        state.readings.add(payload)
        if is_ours(output.stop_reason):
            # The token that fired belongs to the text, unlike a stop token.
            state.detokenizer.include_stop_str_in_output = True
