# SPDX-License-Identifier: Apache-2.0
"""Seam into `vllm.v1.engine.core`: the engine checks steering again at admission.

The edits a branch would make:

- `preprocess_add_request` begins with the lines below. An error there concerns one
  request only, so a client that talks to the engine directly cannot make a worker
  raise. The digests must be in place before the stock function builds the `Request`,
  which hashes its prompt's blocks at once.
- `add_request`, which runs later and in the scheduling thread, admits a request again
  when modules have changed in between.
- `_handle_request_preproc_error` tells the client why a steered request was refused.
- `collective_rpc` gives `METHOD` to the registry, which is an attribute of the core.
- A `Request` keeps the configuration that it was admitted under, and what it reads.
"""

from __future__ import annotations

import copy
import sys
from concurrent.futures import Future
from typing import TYPE_CHECKING

from vllm.config.sae_steering_admission import ROWS_KEY, admitted_extra_args
from vllm.config.sae_steering_specs import (
    EXTRA_ARGS_KEYS,
    PRESET_KEY,
    RESERVED_KEYS,
)
from vllm.config.steering import SteeringConfig
from vllm.config.steering_json import Json
from vllm.config.steering_replies import METHOD, ModuleReply
from vllm.engine.steering_active_config import active_steering_config
from vllm.exceptions import VLLMValidationError
from vllm.logger import init_logger
from vllm.plugins.steering.seam import Stock, declare, wrap
from vllm.utils import length_from_prompt_token_ids_or_embeds
from vllm.v1.engine.steering_reads import READS_ATTRIBUTE, reads_of, request_reads
from vllm.v1.engine.steering_refusals import stop_reason_of

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.core import EngineCore, EngineCoreProc
    from vllm.v1.request import Request

logger = init_logger(__name__)

MODULE = "vllm.v1.engine.core"
_OURS = (*EXTRA_ARGS_KEYS, PRESET_KEY, *RESERVED_KEYS)


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
    call = ("self", "method", "timeout", "args", "kwargs")
    wrap(f"{core}.collective_rpc", call, _collective_rpc)


def _preprocess_add_request(stock: Stock) -> Stock:
    def preprocess_add_request(
        self: EngineCore, request: EngineCoreRequest
    ) -> tuple[Request, int]:
        params = request.sampling_params
        config = active_steering_config(self.vllm_config)
        has_default = config is not None and config.default_preset is not None
        if params is None or not (is_steered(request) or has_default):
            return stock(self, request)
        # In-process clients share the object between the n requests of a prompt, so
        # the engine writes into its own copy.
        params = copy.copy(params)
        length = length_from_prompt_token_ids_or_embeds(
            request.prompt_token_ids, request.prompt_embeds
        )
        params.extra_args = admitted_extra_args(
            params.extra_args, config, length, request.resumable
        )
        reads = reads_of(params.extra_args, config)
        if any(read.reads("prefill") for read in reads):
            # As with prompt log-probabilities: what is read has to be computed.
            params.skip_reading_prefix_cache = True
        request.sampling_params = params
        made, wave = stock(self, request)
        made.steering_config = config
        made.sae_reads = request_reads(made, config)
        return made, wave

    return preprocess_add_request


def is_steered(request: EngineCoreRequest) -> bool:
    """Whether a request that arrives asks for steering, or for what is reserved."""
    params = request.sampling_params
    args = (params.extra_args if params is not None else None) or {}
    return any(key in args for key in _OURS)


def admit_again(request: Request, core: EngineCore) -> None:
    """Bring a request up to date with modules that changed since it was admitted.

    Raises:
        VLLMValidationError: a module that it names is gone, or not available now.
    """
    admitted_under: SteeringConfig | None = request.steering_config
    if admitted_under is None:
        return
    config = active_steering_config(core.vllm_config)
    if config is admitted_under:
        return
    params = request.sampling_params
    before = params.extra_args or {}
    after = admitted_extra_args(before, config, request.num_prompt_tokens)
    request.steering_config = config
    request.sae_reads = request_reads(request, config)
    if after is not None and after.get(ROWS_KEY) != before.get(ROWS_KEY):
        # The module has other weights now, so the blocks have other keys.
        params.extra_args = after
        request.block_hashes.clear()
        request.update_block_hashes()


def _add_request(stock: Stock) -> Stock:
    def add_request(self: EngineCore, request: Request, request_wave: int = 0) -> None:
        try:
            admit_again(request, self)
        except VLLMValidationError as error:
            from vllm.v1.engine.core import EngineCoreProc

            if not isinstance(self, EngineCoreProc):
                raise
            # Raising here would end the engine.
            refuse(self, request.request_id, request.client_index, error)
            return
        stock(self, request, request_wave)

    return add_request


def refuse(
    core: EngineCoreProc, request_id: str, client_index: int, error: VLLMValidationError
) -> None:
    """Answer one request with an error that says why."""
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason

    logger.warning("Steering: request %s refused: %s", request_id, error)
    output = EngineCoreOutput(
        request_id,
        [],
        finish_reason=FinishReason.ERROR,
        stop_reason=stop_reason_of(error),
    )
    outputs = EngineCoreOutputs(finished_requests={request_id}, outputs=[output])
    core.output_queue.put_nowait((client_index, outputs))


def _handle_request_preproc_error(stock: Stock) -> Stock:
    def handle(self: EngineCoreProc, request: EngineCoreRequest) -> None:
        # The stock function is called, and logs, inside an `except` block.
        error = sys.exc_info()[1]
        if isinstance(error, VLLMValidationError) and is_steered(request):
            refuse(self, request.request_id, request.client_index, error)
        else:
            stock(self, request)

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
        listed: Future[list[ModuleReply]] = Future()
        result.add_done_callback(lambda done: listed.set_result([done.result()]))
        return listed

    return collective_rpc
