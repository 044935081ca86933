# SPDX-License-Identifier: Apache-2.0
"""Checks a request's steering before its route answers, streams included."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import NoneType
from typing import NamedTuple

from pydantic import BaseModel
from starlette.requests import Request

from vllm.config.sae_readout_specs import (
    check_generated_values,
    check_prompt_values,
)
from vllm.config.sae_steering_admission import refuse_reserved_key
from vllm.config.sae_steering_parser import parse_steering_request
from vllm.config.sae_steering_specs import READOUT_KEY
from vllm.config.steering import SteeringConfig
from vllm.config.steering_checks import bad, refusal
from vllm.config.steering_json import Json
from vllm.entrypoints.openai.steering.request_fields import (
    refuse_ambiguous_body,
    refuse_beam_search,
    refuse_misspelt_fields,
    steering_of,
)
from vllm.sampling_params import SamplingParams

# In bytes. Checking a smaller one takes at most a few milliseconds.
LARGE_BODY = 32 << 10


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
    params = fields.get("sampling_params")  # of a raw request, or an unknown field
    extra_args = fields.get("vllm_xargs")
    if isinstance(params, SamplingParams):
        extra_args = params.extra_args
        refuse_reading(extra_args)
    elif not isinstance(extra_args, (Mapping, NoneType)):
        # The batch route has no type for it.
        raise bad("vllm_xargs", extra_args, "null or an object")
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


async def checked_request(
    request: BaseModel, config: SteeringConfig | None, raw_request: Request | None
) -> Json:
    """As `check_request`; also refuses steering with two meanings in the body.

    A large body is checked in a thread, so that other requests get their turn: the
    checks are Python, which lets other threads run every few milliseconds.

    Args:
        request, config: as of `check_request`.
        raw_request: what was sent, if it came over HTTP.
    """
    body = b""
    if raw_request is not None:
        # Starlette has read the body before and keeps it.
        with suppress(RuntimeError):
            body = await raw_request.body()

    def check() -> Json:
        steering = check_request(request, config)
        refuse_ambiguous_body(body)
        return steering

    if len(body) <= LARGE_BODY:
        return check()
    return await asyncio.to_thread(check)


def refuse_reading(extra_args: Json | None) -> None:
    """Raise when a raw request reads features, which its answer cannot carry."""
    if extra_args and extra_args.get(READOUT_KEY):
        raise refusal(
            f"sampling_params.extra_args.{READOUT_KEY}",
            "the answers of this route have no field for features: use "
            "/v1/completions, /v1/chat/completions, /v1/responses or "
            "/v1/steering/encode",
        )


class AnswerTokens(NamedTuple):
    """The tokens of which an answer may hold values.

    Attributes:
        prompt_field: the field with the prompts.
        prompts: tokens of each prompt.
        field: the field with the tokens that a choice may have.
        generated: that all choices may have; 0 if the answer hands them over as they
            come.
    """

    prompt_field: str
    prompts: Sequence[int]
    field: str
    generated: int


def check_answer(
    request: BaseModel, config: SteeringConfig, tokens: AnswerTokens
) -> None:
    """Limit the features in the answer to an OpenAI request.

    Args:
        request: it has passed `check_request`, and reads features.
        config: of the engine that will run it.
        tokens: that may be read.

    Raises:
        VLLMValidationError: the answer would have too many values.
    """
    given = {**(dict(request).get("vllm_xargs") or {}), **steering_of(request)}
    steering = parse_steering_request(given, config)
    if steering is None:
        return
    reads, most = steering.reads, config.max_answer_values
    check_prompt_values(tokens.prompt_field, tokens.prompts, reads, most)
    check_generated_values(tokens.field, tokens.generated, reads, most)
