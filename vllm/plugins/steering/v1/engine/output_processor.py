# SPDX-License-Identifier: Apache-2.0
"""Seam into `vllm.v1.engine.output_processor`: what a request has read, in its outputs.

The edits a branch would make: `RequestState` keeps `Readings` as it keeps
log-probabilities, `CompletionOutput` has `sae_features` and `RequestOutput` has
`prompt_sae_features`. Here the state of a request that reads is an instance of a
subclass; the state of any other is stock's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

from vllm.config.sae_readout_specs import READOUT_KEY
from vllm.plugins.steering.seam import check_signature, resolve, wrap
from vllm.v1.engine.steering_read_outputs import Readings
from vllm.v1.engine.steering_reads import PAYLOAD_KEY, STOP_PREFIX

MODULE = "vllm.v1.engine.output_processor"
STATE = f"{MODULE}:RequestState"
COMPLETION = ("self", "token_ids", "finish_reason", "stop_reason")
REQUEST = (
    "self",
    "external_req_id",
    "outputs",
    "finished",
    "kv_transfer_params",
    "ec_transfer_params",
    "error",
)


def install() -> None:
    """Collect what requests have read."""
    for name, parameters in (
        ("_new_completion_output", COMPLETION),
        ("_new_request_output", REQUEST),
    ):
        target = f"{STATE}.{name}"
        check_signature(target, resolve(target)[2], parameters)
    wrap(
        f"{MODULE}:OutputProcessor.add_request",
        ("self", "request", "prompt", "parent_req", "request_index", "queue"),
        _make_add_request,
    )
    wrap(
        f"{MODULE}:OutputProcessor.process_outputs",
        (
            "self",
            "engine_core_outputs",
            "engine_core_timestamp",
            "iteration_stats",
            "weight_version",
        ),
        _make_process_outputs,
    )


@functools.cache
def reading_state() -> type:
    """The subclass of `RequestState` for requests that read."""
    _, _, stock = resolve(STATE)

    class ReadingRequestState(stock):  # type: ignore[misc, valid-type]
        readings: Readings

        def _new_completion_output(
            self, token_ids: Any, finish_reason: Any, stop_reason: Any
        ) -> Any:
            output = super()._new_completion_output(
                token_ids, finish_reason, stop_reason
            )
            if finish_reason is not None:
                generated = self.detokenizer.num_output_tokens()
                self.readings.finish(generated, is_ours(stop_reason))
            output.sae_features = self.readings.take_output(self._is_delta())
            return output

        def _new_request_output(self, *args: Any, **kwargs: Any) -> Any:
            output = super()._new_request_output(*args, **kwargs)
            output.prompt_sae_features = self.readings.take_prompt(self._is_delta())
            return output

        def _is_delta(self) -> bool:
            from vllm.sampling_params import RequestOutputKind

            return self.output_kind == RequestOutputKind.DELTA

    return ReadingRequestState


def is_ours(stop_reason: Any) -> bool:
    """Whether a request ended because of a feature."""
    return isinstance(stop_reason, str) and stop_reason.startswith(STOP_PREFIX)


def _make_add_request(stock: Callable[..., Any]) -> Callable[..., Any]:
    def add_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, request, *args, **kwargs)
        params = request.sampling_params
        if params is None or not params.extra_args:
            return
        if params.extra_args.get(READOUT_KEY):
            state = self.request_states[request.request_id]
            state.readings = Readings(params.extra_args, state.prompt_len)
            state.__class__ = reading_state()

    return add_request


def _make_process_outputs(stock: Callable[..., Any]) -> Callable[..., Any]:
    def process_outputs(
        self: Any, engine_core_outputs: list[Any], *args: Any, **kwargs: Any
    ) -> Any:
        take_payloads(self.request_states, engine_core_outputs)
        return stock(self, engine_core_outputs, *args, **kwargs)

    return process_outputs


def take_payloads(states: dict[str, Any], outputs: Iterable[Any]) -> None:
    """Move what was read from the engine's outputs to the states of their requests."""
    for output in outputs:
        params = output.ec_transfer_params
        if params is None:
            continue
        state = states.get(output.request_id)
        if not isinstance(state, reading_state()):
            continue
        payload = params.pop(PAYLOAD_KEY, None)
        if payload is not None:
            state.readings.add(payload)  # type: ignore[attr-defined]
        if not params:
            output.ec_transfer_params = None
        if is_ours(output.stop_reason) and state.detokenizer is not None:  # type: ignore[attr-defined]
            # The token that fired belongs to the text, unlike a stop token.
            state.detokenizer.include_stop_str_in_output = True  # type: ignore[attr-defined]
