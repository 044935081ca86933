# SPDX-License-Identifier: Apache-2.0
"""Seam into `vllm.v1.engine.input_processor`: bad steering is an HTTP 400.

The edit a branch would make: `_validate_params` ends by parsing the request's
steering. `process_inputs`, which calls it, limits what the result may hold of what the
request reads, and writes the canonical specs into its private copy of the sampling
parameters. The caller's object is never changed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from vllm.config.sae_readout_specs import check_generated_values
from vllm.config.sae_steering_admission import (
    canonical_extra_args,
    refuse_pooling,
    refuse_reserved_key,
    refuse_streaming_input,
)
from vllm.config.sae_steering_parser import parse_steering_request
from vllm.config.sae_steering_request import SteeringRequest
from vllm.config.steering import SteeringConfig
from vllm.engine.steering_active_config import active_steering_config
from vllm.plugins.steering.seam import Stock, declare, wrap
from vllm.pooling_params import PoolingParams
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.utils import length_from_prompt_token_ids_or_embeds

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.input_processor import InputProcessor

MODULE = "vllm.v1.engine.input_processor"
PROCESS_INPUTS = (
    "self",
    "request_id",
    "prompt",
    "params",
    "supported_tasks",
    "arrival_time",
    "lora_request",
    "tokenization_kwargs",
    "trace_headers",
    "priority",
    "data_parallel_rank",
    "resumable",
    "session_id",
    "kv_hints",
)


class Parsed(NamedTuple):
    """What one request asks for, under the configuration that it was parsed with."""

    params: SamplingParams
    config: SteeringConfig | None
    steering: SteeringRequest | None


def install() -> None:
    """Check steering where vLLM checks sampling parameters."""
    declare(f"{MODULE}:InputProcessor", "sae_parsed")
    wrap(
        f"{MODULE}:InputProcessor._validate_params",
        ("self", "params", "supported_tasks"),
        _make_validate_params,
    )
    wrap(
        f"{MODULE}:InputProcessor.process_inputs", PROCESS_INPUTS, _make_process_inputs
    )


def _parse(processor: InputProcessor, params: SamplingParams) -> Parsed:
    config = active_steering_config(processor.vllm_config)
    return Parsed(params, config, parse_steering_request(params.extra_args, config))


def _make_validate_params(stock: Stock) -> Stock:
    def _validate_params(
        self: InputProcessor, params: object, supported_tasks: object
    ) -> object:
        watermarking = stock(self, params, supported_tasks)
        if isinstance(params, SamplingParams):
            refuse_reserved_key(params.extra_args)
            self.sae_parsed = _parse(self, params)
        elif isinstance(params, PoolingParams):
            refuse_pooling(params.extra_kwargs)
        return watermarking

    return _validate_params


def _check_values(
    processor: InputProcessor,
    request: EngineCoreRequest,
    steering: SteeringRequest,
    most: int,
) -> None:
    """Limit what a result holds of its tokens, unless each is handed over at once."""
    params = request.sampling_params
    assert params is not None
    if not steering.reads or params.output_kind is RequestOutputKind.DELTA:
        return
    length = length_from_prompt_token_ids_or_embeds(
        request.prompt_token_ids, request.prompt_embeds
    )
    room = max(processor.model_config.max_model_len - length, 0)
    tokens = room if params.max_tokens is None else min(params.max_tokens, room)
    check_generated_values("max_tokens", tokens * params.n, steering.reads, most)


def _make_process_inputs(stock: Stock) -> Stock:
    def process_inputs(
        self: InputProcessor,
        request_id: object,
        prompt: object,
        params: object,
        *args: object,
        **kwargs: object,
    ) -> object:
        request = stock(self, request_id, prompt, params, *args, **kwargs)
        own = request.sampling_params
        if own is None:
            return request
        parsed, self.sae_parsed = self.sae_parsed, None
        if parsed is None or parsed.params is not params:
            parsed = _parse(self, own)
        config, steering = parsed.config, parsed.steering
        if config is not None and steering is not None:
            _check_values(self, request, steering, config.max_answer_values)
        if own.extra_args or (config is not None and config.default_preset):
            refuse_streaming_input(steering, request.resumable)
            own.extra_args = canonical_extra_args(own.extra_args, steering, config)
        return request

    return process_inputs
