# SPDX-License-Identifier: Apache-2.0
"""Checks a request's steering before its route answers, streams included."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from pydantic import BaseModel

from vllm.config.sae_readout_specs import check_prompt_values
from vllm.config.sae_steering_admission import refuse_reserved_key
from vllm.config.sae_steering_parser import parse_steering_request
from vllm.config.sae_steering_specs import READOUT_KEY
from vllm.config.steering import SteeringConfig
from vllm.config.steering_checks import refusal
from vllm.config.steering_json import Json
from vllm.entrypoints.openai.steering.read_choices import may_read
from vllm.entrypoints.openai.steering.request_fields import (
    refuse_beam_search,
    refuse_misspelt_fields,
    steering_of,
)

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams


def check_request(request: BaseModel, config: SteeringConfig | None) -> Json:
    """The request's steering, in canonical form, under its fields.

    Args:
        request: an OpenAI request, or a raw one with `sampling_params`.
        config: of the engine that will run it.

    Raises:
        VLLMValidationError: the steering is not valid.
    """
    refuse_misspelt_fields(request)
    fields = dict(request)
    params: SamplingParams | None = fields.get("sampling_params")
    extra_args = fields.get("vllm_xargs")
    if params is not None:
        extra_args = params.extra_args
        refuse_reading(extra_args)
    refuse_reserved_key(extra_args)
    given = {**(extra_args or {}), **steering_of(request)}
    steering = parse_steering_request(given, config)
    if steering is None:
        return {}
    if fields.get("use_beam_search"):
        refuse_beam_search(request)  # names the field; else a default preset steers
        raise refusal(
            "use_beam_search",
            "beam search does not support steering, expected use_beam_search=false, no "
            "specs, and null as steering_preset where the server has a default",
        )
    return steering.to_extra_args()


def refuse_reading(extra_args: Json | None) -> None:
    """Raise when a raw request reads features, which its answer cannot carry."""
    if extra_args and extra_args.get(READOUT_KEY):
        raise refusal(
            f"sampling_params.extra_args.{READOUT_KEY}",
            "the answers of this route have no field for features: use "
            "/v1/completions, /v1/chat/completions, /v1/responses or "
            "/v1/steering/encode",
        )


def check_prompts(
    request: BaseModel,
    config: SteeringConfig | None,
    path: str,
    lengths: Iterable[int],
) -> None:
    """Limit the features of prompts in the answer to an OpenAI request.

    Args:
        request: it has passed `check_request`.
        config: of the engine that will run it.
        path: the field with the prompts.
        lengths: tokens of each prompt.

    Raises:
        VLLMValidationError: the answer would have too many values.
    """
    if not may_read(request, config):
        return
    given = {**(dict(request).get("vllm_xargs") or {}), **steering_of(request)}
    steering = parse_steering_request(given, config)
    if steering is not None:
        check_prompt_values(path, lengths, steering.reads)
