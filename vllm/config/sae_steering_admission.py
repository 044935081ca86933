# SPDX-License-Identifier: Apache-2.0
"""What the engine writes into a request's `extra_args` when it admits it.

Under `ROWS_KEY`, which no client may set, the prefix-cache digest (hex) of each phase,
or, of a request with spans, of each piece of its schedule; None where not steered:

    {"prefill": digest, "decode": digest}
    {"num_prompt_tokens": 9, "pieces": [[8, digest], [9, digest], [None, digest]]}

Each piece ends before its position. The last one has no end.

Beside it are the canonical specs and, under `PLAN_KEY`, what the workers do.
"""

from __future__ import annotations

from collections.abc import Mapping

from vllm.config.sae_steering_plan import encode_plan
from vllm.config.sae_steering_request import SteeringRequest
from vllm.config.sae_steering_spans import TOKEN_PHASES
from vllm.config.sae_steering_specs import (
    EXPANDED_KEY,
    EXTRA_ARGS_KEYS,
    PLAN_KEY,
    PRESET_KEY,
    RESERVED_KEYS,
    ROWS_KEY,
)
from vllm.config.steering import SteeringConfig
from vllm.config.steering_checks import refusal
from vllm.config.steering_json import Json, JsonView


def refuse_reserved_key(extra_args: JsonView | None) -> None:
    """Raise `VLLMValidationError` when a client sets what only the engine may."""
    for key in RESERVED_KEYS:
        if isinstance(extra_args, Mapping) and key in extra_args:
            raise refusal(key, "is reserved for the engine, expected no such key")


def refuse_pooling(extra_kwargs: JsonView | None) -> None:
    """Raise when a pooling request (embed, classify, score, …) asks for steering."""
    for key in (*EXTRA_ARGS_KEYS, PRESET_KEY, *RESERVED_KEYS):
        if isinstance(extra_kwargs, Mapping) and key in extra_kwargs:
            raise refusal(
                f"extra_kwargs.{key}",
                "pooling requests cannot be steered, expected no such key",
            )


def refuse_streaming_input(steering: SteeringRequest | None, resumable: bool) -> None:
    """Raise when a request with streaming input is steered.

    Its output becomes prompt when more input arrives, so a token's phase would
    change after the token was computed.
    """
    if steering is not None and resumable:
        key = next(iter(steering.to_extra_args()))
        raise refusal(
            key, "steering does not support streaming input (resumable requests)"
        )


def canonical_extra_args(
    extra_args: JsonView | None,
    steering: SteeringRequest | None,
    config: SteeringConfig | None,
) -> Json | None:
    """A copy of `extra_args` with the canonical specs, after presets are applied."""
    ours = {*EXTRA_ARGS_KEYS, PRESET_KEY, *RESERVED_KEYS}
    given = extra_args or {}
    args = {key: value for key, value in given.items() if key not in ours}
    if steering is not None:
        args.update(steering.to_extra_args())
    if steering is not None or (config is not None and config.default_preset):
        args[EXPANDED_KEY] = True
    return args or None


def admitted_extra_args(
    extra_args: JsonView | None,
    steering: SteeringRequest | None,
    config: SteeringConfig | None,
    num_prompt_tokens: int,
) -> Json | None:
    """`extra_args` of a request that the engine admits; `steering` is their parse."""
    args = canonical_extra_args(extra_args, steering, config)
    if steering is None or args is None:
        return args
    args[PLAN_KEY] = encode_plan(steering, num_prompt_tokens)
    if not steering.has_spans:
        args[ROWS_KEY] = {phase: steering.digest(phase) for phase in TOKEN_PHASES}
        return args
    args[ROWS_KEY] = {
        "num_prompt_tokens": num_prompt_tokens,
        "pieces": [
            [piece.stop, piece.digest] for piece in steering.schedule(num_prompt_tokens)
        ],
    }
    return args


def admitted_schedule(
    extra_args: JsonView, num_prompt_tokens: int
) -> list[tuple[int | None, str | None]]:
    """Where each piece of an admitted request stops, and its digest."""
    rows = extra_args.get(ROWS_KEY)
    if rows is None:
        return [(None, None)]
    if "pieces" in rows:
        return rows["pieces"]
    return [(num_prompt_tokens, rows["prefill"]), (None, rows["decode"])]
