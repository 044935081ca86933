# SPDX-License-Identifier: Apache-2.0
"""How the engine core admits steered requests, or refuses them."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from vllm.config.sae_steering_admission import (
    admitted_extra_args,
    refuse_streaming_input,
)
from vllm.config.sae_steering_parser import parse_steering_request
from vllm.config.sae_steering_request import SteeringRequest
from vllm.config.sae_steering_specs import (
    EXTRA_ARGS_KEYS,
    PRESET_KEY,
    RESERVED_KEYS,
    ROWS_KEY,
)
from vllm.config.steering import SteeringConfig
from vllm.config.steering_checks import shown
from vllm.exceptions import VLLMValidationError
from vllm.logger import init_logger
from vllm.utils import length_from_prompt_token_ids_or_embeds
from vllm.v1.engine.steering_reads import request_reads
from vllm.v1.engine.steering_refusals import stop_reason_of

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.core import EngineCoreProc
    from vllm.v1.request import Request

logger = init_logger(__name__)

_OURS = (*EXTRA_ARGS_KEYS, PRESET_KEY, *RESERVED_KEYS)


def is_steered(request: EngineCoreRequest) -> bool:
    """Whether a request that arrives asks for steering, or for what is reserved."""
    params = request.sampling_params
    args = (params.extra_args if params is not None else None) or {}
    return any(key in args for key in _OURS)


def concerns_steering(
    request: EngineCoreRequest, config: SteeringConfig | None
) -> bool:
    """Whether a request that arrives must be admitted here."""
    if request.sampling_params is None:
        return False
    has_default = config is not None and config.default_preset is not None
    return has_default or is_steered(request)


def admit(
    request: EngineCoreRequest, config: SteeringConfig | None
) -> SteeringRequest | None:
    """Check a request's steering and write what the scheduler and workers need.

    Returns:
        The request's steering, for `follow_admission`.

    Raises:
        VLLMValidationError: the request's steering is not valid on this engine.
    """
    # In-process clients share the object between the n requests of a prompt, so the
    # engine writes into its own copy.
    params = copy.copy(request.sampling_params)
    steering = parse_steering_request(params.extra_args, config)
    refuse_streaming_input(steering, request.resumable)
    length = length_from_prompt_token_ids_or_embeds(
        request.prompt_token_ids, request.prompt_embeds
    )
    params.extra_args = admitted_extra_args(params.extra_args, steering, config, length)
    if steering is not None and any(r.reads("prefill") for r in steering.reads):
        # As with prompt log-probabilities: what is read has to be computed.
        params.skip_reading_prefix_cache = True
    request.sampling_params = params
    return steering


def follow_admission(
    request: Request, config: SteeringConfig | None, steering: SteeringRequest | None
) -> None:
    """Note the configuration that a request was admitted under, and what it reads."""
    request.steering_config = config
    reads = () if steering is None else steering.reads
    request.sae_reads = request_reads(request, reads, config)


def admit_again(request: Request, config: SteeringConfig | None) -> None:
    """Bring a request up to date with modules that changed since it was admitted.

    Raises:
        VLLMValidationError: a module that it names is gone, or not available now.
    """
    admitted_under: SteeringConfig | None = request.steering_config
    if admitted_under is None:
        return
    if config is admitted_under:
        return
    params = request.sampling_params
    before = params.extra_args or {}
    steering = parse_steering_request(before, config)
    after = admitted_extra_args(before, steering, config, request.num_prompt_tokens)
    follow_admission(request, config, steering)
    if after is None:
        return
    params.extra_args = after
    if after.get(ROWS_KEY) != before.get(ROWS_KEY):
        # The module has other weights now, so the blocks have other keys.
        request.block_hashes.clear()
        request.update_block_hashes()


def refuse(
    core: EngineCoreProc, request_id: str, client_index: int, error: VLLMValidationError
) -> None:
    """Answer one request with an error that says why."""
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason

    # The client may have chosen the id: any text, of any length.
    logger.warning("Steering: request %s refused: %s", shown(request_id), error)
    output = EngineCoreOutput(
        request_id,
        [],
        finish_reason=FinishReason.ERROR,
        stop_reason=stop_reason_of(error),
    )
    outputs = EngineCoreOutputs(finished_requests={request_id}, outputs=[output])
    core.output_queue.put_nowait((client_index, outputs))
