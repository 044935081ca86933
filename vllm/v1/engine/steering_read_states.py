# SPDX-License-Identifier: Apache-2.0
"""The front end's states of requests that read."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm.config.sae_features import FEATURES
from vllm.config.sae_readout_step import StepRows
from vllm.config.sae_steering_specs import READOUT_KEY
from vllm.config.steering_checks import refusal
from vllm.config.steering_json import JsonView
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.steering_read_log import LogReader, ReadLog
from vllm.v1.engine.steering_read_outputs import PendingFeatures, Readings
from vllm.v1.engine.steering_reads import PAYLOAD_KEY, STOP_PREFIX

if TYPE_CHECKING:
    from vllm.outputs import CompletionOutput, RequestOutput
    from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
    from vllm.v1.engine.output_processor import OutputProcessor

# Of one stream. A whole answer holds about half of it at most, by default.
MAX_UNREAD_BYTES = 16 << 20


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
            assert self.detokenizer is not None
            generated = self.detokenizer.num_output_tokens()
            self.readings.advance(generated, is_ours(stop_reason))
            output.sae_features = self.readings.take_output(self._is_delta())
            return output

        def _new_request_output(self, *args: object, **kwargs: object) -> RequestOutput:
            output = super()._new_request_output(*args, **kwargs)
            prompt = self.readings.take_prompt(self._is_delta())
            # Deltas of several samples may be joined before somebody reads them, and
            # each sample has read the prompt. The first one's is the prompt's record.
            if not (self._is_delta() and self.request_index):
                output.prompt_sae_features = prompt
            waiting = None if self.queue is None else self.queue.output
            if unread_bytes(waiting) > MAX_UNREAD_BYTES:
                self.readings.log.unread.append(self)
            return output

        def _is_delta(self) -> bool:
            return self.output_kind == RequestOutputKind.DELTA

    return ReadingRequestState


def is_ours(stop_reason: object) -> bool:
    """Whether a request ended because of a feature."""
    return isinstance(stop_reason, str) and stop_reason.startswith(STOP_PREFIX)


def follow(log: ReadLog, states: JsonView, request: EngineCoreRequest) -> None:
    """Have the state of a new request collect what it reads, if it does."""
    params = request.sampling_params
    if params is None or not params.extra_args:
        return
    if params.extra_args.get(READOUT_KEY):
        state = states[request.request_id]
        reader = LogReader(log, request.request_id)
        state.readings = Readings(params.extra_args, state.prompt_len, reader)
        state.__class__ = reading_state()


def unread_bytes(waiting: object) -> int:
    """Bytes of generated tokens' values in an output that no client has taken yet."""
    from vllm.outputs import RequestOutput

    if not isinstance(waiting, RequestOutput):
        return 0
    pending = (vars(output).get(FEATURES) for output in waiting.outputs)
    return sum(one.size for one in pending if isinstance(one, PendingFeatures))


def end_unread(processor: OutputProcessor, log: ReadLog) -> list[str]:
    """End the streams whose clients leave too much unread.

    A stream has no limit of its values, because it hands them over as they come. A
    client that does not take them would have the server keep all of them.

    Returns:
        The ids of the requests to abort.
    """
    ended: list[str] = []
    states, log.unread = log.unread, []
    for state in states:
        parent = state.parent_req
        ids = [state.request_id] if parent is None else list(parent.child_requests)
        if state.queue is not None and not isinstance(state.queue.output, Exception):
            state.queue.put(
                refusal(
                    READOUT_KEY,
                    f"found more than {MAX_UNREAD_BYTES >> 20} MiB of values in the "
                    "stream that the client has not taken, expected a client that "
                    "reads as fast as tokens come: read fewer sites or features",
                )
            )
        ended += processor.abort_requests(ids, internal=True)
    return ended


def take_steps(log: ReadLog, outputs: Sequence[EngineCoreOutput]) -> None:
    """Move the steps from the engine's outputs to the log."""
    if not outputs:
        return
    first = outputs[0]
    params = first.ec_transfer_params
    if params is not None and PAYLOAD_KEY in params:
        for step in params.pop(PAYLOAD_KEY):
            log.add(StepRows.from_wire(step))
        first.ec_transfer_params = params or None


def keep_last_tokens(states: JsonView, ended: Sequence[EngineCoreOutput]) -> None:
    """The token on which a feature fired belongs to the text, unlike a stop token.

    Args:
        ended: outputs that have a stop reason.
    """
    for output in ended:
        state = states.get(output.request_id) if is_ours(output.stop_reason) else None
        if state is not None:
            state.detokenizer.include_stop_str_in_output = True
