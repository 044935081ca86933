# SPDX-License-Identifier: Apache-2.0
"""Seam into `vllm.v1.engine.core`: the engine checks steering again at admission.

The edits a branch would make: `preprocess_add_request` begins with the lines below.
An error there concerns one request only, so a client that talks to the engine
directly cannot make a worker raise. The digests must be in place before the stock
function builds the `Request`, which hashes its prompt's blocks at once. `add_request`,
which runs later and in the scheduling thread, refuses a request whose modules have
changed in between. `steering_modules` is a method beside `collective_rpc`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from vllm.config.sae_steering_admission import ROWS_KEY, admitted_extra_args
from vllm.config.sae_steering_specs import EXTRA_ARGS_KEYS
from vllm.engine.steering_active_config import active_steering_config
from vllm.exceptions import VLLMValidationError
from vllm.logger import init_logger
from vllm.plugins.steering.seam import wrap

logger = init_logger(__name__)

MODULE = "vllm.v1.engine.core"
# On a `Request`: the configuration that it was admitted under.
ADMITTED_UNDER = "steering_config"
# On an `EngineCore`: its `SteeringRegistry`, made when first asked for.
REGISTRY = "steering_registry"
_OURS = (*EXTRA_ARGS_KEYS, ROWS_KEY)


def install() -> None:
    """Admit steering before the engine builds a request."""
    wrap(
        f"{MODULE}:EngineCore.preprocess_add_request",
        ("self", "request"),
        _make_preprocess_add_request,
    )
    wrap(
        f"{MODULE}:EngineCore.add_request",
        ("self", "request", "request_wave"),
        _make_add_request,
    )
    wrap(
        f"{MODULE}:EngineCore.collective_rpc",
        ("self", "method", "timeout", "args", "kwargs"),
        _make_collective_rpc,
    )


def _make_preprocess_add_request(stock: Callable[..., Any]) -> Callable[..., Any]:
    def preprocess_add_request(self: Any, request: Any) -> Any:
        params = request.sampling_params
        if params is not None and params.extra_args:
            args = params.extra_args
            if any(key in args for key in _OURS):
                # In-process clients share the object between the n requests of a
                # prompt, so the engine writes into its own copy.
                params = copy.copy(params)
                config = active_steering_config(self.vllm_config, in_core=True)
                params.extra_args = admitted_extra_args(args, config, request.resumable)
                request.sampling_params = params
                made, wave = stock(self, request)
                setattr(made, ADMITTED_UNDER, config)
                return made, wave
        return stock(self, request)

    return preprocess_add_request


def check_still_admitted(request: Any, vllm_config: Any) -> None:
    """Raise `VLLMValidationError` when the request's modules are no longer the same."""
    admitted_under = getattr(request, ADMITTED_UNDER, None)
    if admitted_under is None:
        return
    config = active_steering_config(vllm_config, in_core=True)
    if config is admitted_under:
        return
    args = request.sampling_params.extra_args or {}
    again = admitted_extra_args(args, config) or {}
    if again.get(ROWS_KEY) != args.get(ROWS_KEY):
        raise VLLMValidationError(
            "a steering module that the request names was replaced before it started"
        )


def _make_add_request(stock: Callable[..., Any]) -> Callable[..., Any]:
    def add_request(self: Any, request: Any, request_wave: int = 0) -> Any:
        try:
            check_still_admitted(request, self.vllm_config)
        except VLLMValidationError as error:
            from vllm.v1.engine.core import EngineCoreProc

            if not isinstance(self, EngineCoreProc):
                raise
            # Raising here would end the engine.
            logger.warning(
                "Steering: request %s refused: %s", request.request_id, error
            )
            self._send_error_outputs_to_client(
                [request.request_id], request.client_index
            )
            return None
        return stock(self, request, request_wave)

    return add_request


def _make_collective_rpc(stock: Callable[..., Any]) -> Callable[..., Any]:
    def collective_rpc(
        self: Any,
        method: Any,
        timeout: float | None = None,
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if method != "steering_modules":
            return stock(self, method, timeout, args, kwargs)
        # Deferred: only engines whose modules change need the loaders here.
        from vllm.v1.engine.core import EngineCoreProc
        from vllm.v1.engine.steering_registry import SteeringRegistry

        registry = self.__dict__.get(REGISTRY)
        if registry is None:
            registry = self.__dict__[REGISTRY] = SteeringRegistry(self)
        result = registry.call(*args, **(kwargs or {}))
        if not isinstance(result, Future):
            return [result]
        if not isinstance(self, EngineCoreProc):
            return [result.result()]
        # The engine goes on; the client is answered when the result is there.
        listed: Future[list[Any]] = Future()
        result.add_done_callback(lambda done: listed.set_result([done.result()]))
        return listed

    return collective_rpc
