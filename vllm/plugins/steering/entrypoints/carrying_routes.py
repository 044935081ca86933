# SPDX-License-Identifier: Apache-2.0
"""Seams into the OpenAI request models: routes that carry steering.

`vllm.entrypoints.openai.{completion,chat_completion,responses}.protocol`. The edits a
branch would make: each request class declares the fields of
`request_fields.FIELD_SCHEMAS`, its `to_sampling_params` folds them into `extra_args`,
and `to_beam_search_params` refuses them. vLLM turns a batch chat request into chat
completion requests and drops nulls there, so the null of `steering_preset`, which opts
out of the server's default, is set again. The render routes, `/invocations`
and the batch runner use the same classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.plugins.steering.seam import BOUND, Stock, resolve, wrap

if TYPE_CHECKING:
    from pydantic import BaseModel


COMPLETION = "vllm.entrypoints.openai.completion.protocol"
CHAT = "vllm.entrypoints.openai.chat_completion.protocol"
RESPONSES = "vllm.entrypoints.openai.responses.protocol"

_MAX_TOKENS = ("self", "max_tokens", "default_sampling_params")
_DEFAULT_MAX_TOKENS = ("self", "default_max_tokens", "default_sampling_params")


def install_completion() -> None:
    """`/v1/completions`."""
    _declare(f"{COMPLETION}:CompletionRequest")
    _carry(f"{COMPLETION}:CompletionRequest", _MAX_TOKENS)
    _refuse_beams(f"{COMPLETION}:CompletionRequest")


def install_chat_completion() -> None:
    """`/v1/chat/completions` and `/v1/chat/completions/batch`."""
    _declare(f"{CHAT}:ChatCompletionRequest")
    _declare(f"{CHAT}:BatchChatCompletionRequest")
    _carry(f"{CHAT}:ChatCompletionRequest", _MAX_TOKENS)
    _refuse_beams(f"{CHAT}:ChatCompletionRequest")
    wrap(
        f"{CHAT}:BatchChatCompletionRequest.to_chat_completion_request",
        ("self", "messages"),
        _make_to_chat_completion_request,
    )


def install_responses() -> None:
    """`/v1/responses`."""
    _declare(f"{RESPONSES}:ResponsesRequest")
    _carry(f"{RESPONSES}:ResponsesRequest", _DEFAULT_MAX_TOKENS)


def _declare(target: str) -> None:
    from vllm.entrypoints.openai.steering.request_fields import declare_fields

    if target not in BOUND:
        _, _, model = resolve(target)
        declare_fields(model)
        BOUND[target] = model


def _carry(model: str, parameters: tuple[str, ...]) -> None:
    wrap(f"{model}.to_sampling_params", parameters, _make_to_sampling_params)


def _refuse_beams(model: str) -> None:
    wrap(f"{model}.to_beam_search_params", _MAX_TOKENS, _make_to_beam_search_params)


def _make_to_sampling_params(stock: Stock) -> Stock:
    from vllm.entrypoints.openai.steering.request_fields import carry_specs

    def to_sampling_params(self: BaseModel, *args: object, **kwargs: object) -> object:
        params = stock(self, *args, **kwargs)
        carry_specs(self, params)
        return params

    return to_sampling_params


def _make_to_chat_completion_request(stock: Stock) -> Stock:
    from vllm.entrypoints.openai.steering.request_fields import carry_preset

    def to_chat_completion_request(self: BaseModel, messages: object) -> object:
        made = stock(self, messages)
        carry_preset(self, made)
        return made

    return to_chat_completion_request


def _make_to_beam_search_params(stock: Stock) -> Stock:
    from vllm.entrypoints.openai.steering.request_fields import refuse_beam_search

    def to_beam_search_params(
        self: BaseModel, *args: object, **kwargs: object
    ) -> object:
        refuse_beam_search(self)
        return stock(self, *args, **kwargs)

    return to_beam_search_params
