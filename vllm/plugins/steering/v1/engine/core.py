# SPDX-License-Identifier: Apache-2.0
"""Seam into `vllm.v1.engine.core`: the engine checks steering again at admission.

The edits a branch would make:

- `preprocess_add_request` begins with `admit`. An error there concerns one request
  only, so a client that talks to the engine directly cannot make a worker raise. The
  digests must be in place before the stock function builds the `Request`, which hashes
  its prompt's blocks at once.
- `add_request`, which runs later and in the scheduling thread, admits a request again
  when modules have changed in between.
- `_handle_request_preproc_error` tells the client why a steered request was refused.
  Since 0.33 validation errors go to `_handle_request_validation_error`, which would
  answer 400 without the path; so that does the same.
- `collective_rpc` gives `METHOD` to the registry, which is an attribute of the core.
- A `Request` keeps the configuration that it was admitted under, and what it reads.
"""

from __future__ import annotations

import sys
from concurrent.futures import Future
from typing import TYPE_CHECKING

from vllm.config.steering_json import Json
from vllm.config.steering_replies import METHOD, ModuleReply
from vllm.engine.steering_active_config import active_steering_config
from vllm.exceptions import VLLMValidationError
from vllm.plugins.steering.seam import Stock, declare, exists, wrap
from vllm.v1.engine.steering_admission import (
    admit,
    admit_again,
    concerns_steering,
    follow_admission,
    is_steered,
    refuse,
)
from vllm.v1.engine.steering_reads import READS_ATTRIBUTE

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.core import EngineCore, EngineCoreProc
    from vllm.v1.request import Request

MODULE = "vllm.v1.engine.core"


def install() -> None:
    """Admit steering before the engine builds a request; let modules change."""
    declare("vllm.v1.request:Request", "steering_config")
    declare("vllm.v1.request:Request", READS_ATTRIBUTE)
    declare(f"{MODULE}:EngineCore", "steering_registry")
    core, process = f"{MODULE}:EngineCore", f"{MODULE}:EngineCoreProc"
    wrap(f"{core}.preprocess_add_request", ("self", "request"), _preprocess_add_request)
    wrap(f"{core}.add_request", ("self", "request", "request_wave"), _add_request)
    wrap(
        f"{process}._handle_request_preproc_error",
        ("self", "request"),
        _handle_request_preproc_error,
    )
    validation_error = f"{process}._handle_request_validation_error"
    if exists(validation_error):
        parameters = ("self", "request", "error")
        wrap(validation_error, parameters, _handle_request_validation_error)
    call = ("self", "method", "timeout", "args", "kwargs")
    wrap(f"{core}.collective_rpc", call, _collective_rpc)


def _preprocess_add_request(stock: Stock) -> Stock:
    def preprocess_add_request(
        self: EngineCore, request: EngineCoreRequest
    ) -> tuple[Request, int]:
        config = active_steering_config(self.vllm_config)
        if not concerns_steering(request, config):
            return stock(self, request)
        steering = admit(request, config)
        made, wave = stock(self, request)
        follow_admission(made, config, steering)
        return made, wave

    return preprocess_add_request


def _add_request(stock: Stock) -> Stock:
    def add_request(self: EngineCore, request: Request, request_wave: int = 0) -> None:
        try:
            admit_again(request, active_steering_config(self.vllm_config))
        except VLLMValidationError as error:
            from vllm.v1.engine.core import EngineCoreProc

            if not isinstance(self, EngineCoreProc):
                raise
            # Raising here would end the engine.
            refuse(self, request.request_id, request.client_index, error)
            return
        stock(self, request, request_wave)

    return add_request


def _handle_request_preproc_error(stock: Stock) -> Stock:
    def handle(self: EngineCoreProc, request: EngineCoreRequest) -> None:
        # The stock function is called, and logs, inside an `except` block.
        error = sys.exc_info()[1]
        if isinstance(error, VLLMValidationError) and is_steered(request):
            refuse(self, request.request_id, request.client_index, error)
        else:
            stock(self, request)

    return handle


def _handle_request_validation_error(stock: Stock) -> Stock:
    def handle(
        self: EngineCoreProc, request: EngineCoreRequest, error: VLLMValidationError
    ) -> None:
        if is_steered(request):
            refuse(self, request.request_id, request.client_index, error)
        else:
            stock(self, request, error)

    return handle


def _collective_rpc(stock: Stock) -> Stock:
    def collective_rpc(
        self: EngineCore,
        method: object,
        timeout: float | None = None,
        args: tuple = (),
        kwargs: Json | None = None,
    ) -> list | Future:
        if method != METHOD:
            return stock(self, method, timeout, args, kwargs)
        # Deferred: only engines whose modules change need the loaders here.
        from vllm.v1.engine.core import EngineCoreProc
        from vllm.v1.engine.steering_registry import SteeringRegistry

        if self.steering_registry is None:
            self.steering_registry = SteeringRegistry(self)
        result = self.steering_registry.call(*args, **(kwargs or {}))
        if not isinstance(result, Future):
            return [result]
        if not isinstance(self, EngineCoreProc):
            return [result.result()]
        # The engine goes on; the client is answered when the result is there.
        return in_a_list(result)

    return collective_rpc


def in_a_list(reply: Future[ModuleReply]) -> Future[list[ModuleReply]]:
    """A future of what `collective_rpc` returns. It fails if the reply's does."""
    listed: Future[list[ModuleReply]] = Future()

    def hand_on(done: Future[ModuleReply]) -> None:
        error = done.exception()
        if error is None:
            listed.set_result([done.result()])
        else:
            listed.set_exception(error)

    reply.add_done_callback(hand_on)
    return listed
