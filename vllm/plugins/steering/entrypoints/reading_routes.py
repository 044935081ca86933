# SPDX-License-Identifier: Apache-2.0
"""Seams into the OpenAI serving classes: answers carry what their requests have read.

The edits a branch would make: where choices are made from outputs, set `sae_features`
and, on a prompt's first choice, `prompt_sae_features`. Routers write such an answer as
`FeaturesAnswer`. vLLM's generators make their
chunks inside. So here a stream that reads is annotated from outside; other streams are
vLLM's own.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, TypeAlias

from vllm.engine.steering_active_config import active_steering_config
from vllm.plugins.steering.seam import Stock, declare, wrap

if TYPE_CHECKING:
    from pydantic import BaseModel

    from vllm.entrypoints.generate.base.serving import GenerateBaseServing
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.context import ConversationContext
    from vllm.entrypoints.openai.steering.read_choices import ResponseReading
    from vllm.outputs import RequestOutput

    OpenAIRequest: TypeAlias = CompletionRequest | ChatCompletionRequest

_OPENAI = "vllm.entrypoints.openai"
COMPLETION = f"{_OPENAI}.completion.serving"
CHAT = f"{_OPENAI}.chat_completion.serving"
BATCH = f"{_OPENAI}.chat_completion.batch_serving"
RESPONSES = f"{_OPENAI}.responses.serving"
CONTEXT = f"{_OPENAI}.responses.context"
ROUTERS = tuple(
    f"{_OPENAI}.{route}.api_router"
    for route in ("completion", "chat_completion", "responses")
)
CONTEXTS = ("SimpleContext", "ParsableContext", "HarmonyContext")

_JSON_RESPONSE = ("content", "status_code", "headers", "media_type", "background")
_METADATA = ("model_name", "tokenizer", "request_metadata")
_CHAT_BATCH = (
    *("self", "request", "generators", "request_id", "model_name"),
    *("all_conversations", "tokenizer", "request_metadata"),
)
_RESPONSES_STREAM = (
    *("self", "request", "sampling_params", "result_generator", "context"),
    *(*_METADATA, "created_time"),
)


def _may_read(serving: GenerateBaseServing, request: BaseModel) -> bool:
    """Whether a request may read features, itself or by its preset."""
    from vllm.entrypoints.openai.steering.read_choices import may_read

    config = active_steering_config(serving.engine_client.vllm_config)
    return may_read(request, config)


def install_completion() -> None:
    """`/v1/completions`."""
    owner = f"{COMPLETION}:OpenAIServingCompletion"
    wrap(
        f"{owner}.completion_stream_generator",
        (
            *("self", "request", "engine_inputs", "result_generator", "request_id"),
            *("created_time", "model_name", "num_prompts", "tokenizer"),
            "request_metadata",
        ),
        _completion_stream,
    )
    wrap(
        f"{owner}.request_output_to_completion_response",
        (
            *("self", "final_res_batch", "request", "request_id", "created_time"),
            *_METADATA,
        ),
        _completion_response,
    )


def _completion_stream(stock: Stock) -> Stock:
    from vllm.entrypoints.openai.steering.read_choices import StreamedChoices

    def completion_stream_generator(
        self: GenerateBaseServing,
        request: OpenAIRequest,
        engine_inputs: object,
        result_generator: AsyncIterator[RequestOutput],
        *args: object,
        **kwargs: object,
    ) -> AsyncIterator[str]:
        if not _may_read(self, request):
            return stock(
                self, request, engine_inputs, result_generator, *args, **kwargs
            )
        choices = StreamedChoices(request.n or 1)
        results = choices.of_prompts(result_generator)
        chunks = stock(self, request, engine_inputs, results, *args, **kwargs)
        return choices.annotate(chunks)

    return completion_stream_generator


def _completion_response(stock: Stock) -> Stock:
    from vllm.entrypoints.openai.steering.read_choices import (
        fill_choices_at_once,
    )

    def request_output_to_completion_response(
        self: GenerateBaseServing,
        final_res_batch: list,
        request: OpenAIRequest,
        *args: object,
        **kwargs: object,
    ) -> object:
        response = stock(self, final_res_batch, request, *args, **kwargs)
        fill_choices_at_once(response.choices, final_res_batch)
        return response

    return request_output_to_completion_response


def install_chat() -> None:
    """`/v1/chat/completions`."""
    owner = f"{CHAT}:OpenAIServingChat"
    common = (
        *("self", "request", "result_generator", "request_id", "model_name"),
        *("conversation", "tokenizer", "request_metadata"),
    )
    wrap(
        f"{owner}.chat_completion_stream_generator",
        (*common, "chat_template_kwargs", "mm_token_counts"),
        _chat_stream,
    )
    wrap(
        f"{owner}.chat_completion_full_generator",
        (*common, "parser", "mm_token_counts"),
        _chat_full,
    )


def _chat_stream(stock: Stock) -> Stock:
    from vllm.entrypoints.openai.steering.read_choices import StreamedChoices

    def chat_completion_stream_generator(
        self: GenerateBaseServing,
        request: OpenAIRequest,
        result_generator: AsyncIterator[RequestOutput],
        *args: object,
        **kwargs: object,
    ) -> AsyncIterator[str]:
        if not _may_read(self, request):
            return stock(self, request, result_generator, *args, **kwargs)
        choices = StreamedChoices(request.n or 1)
        results = choices.of_one(result_generator)
        return choices.annotate(stock(self, request, results, *args, **kwargs))

    return chat_completion_stream_generator


def _chat_full(stock: Stock) -> Stock:
    from vllm.entrypoints.openai.steering.read_choices import (
        LastResult,
        fill_choices,
    )
    from vllm.entrypoints.serve.engine.protocol import ErrorResponse

    async def chat_completion_full_generator(
        self: GenerateBaseServing,
        request: OpenAIRequest,
        result_generator: AsyncIterator[RequestOutput],
        *args: object,
        **kwargs: object,
    ) -> object:
        if not _may_read(self, request):
            return await stock(self, request, result_generator, *args, **kwargs)
        last = LastResult()
        results = last.watch(result_generator)
        response = await stock(self, request, results, *args, **kwargs)
        if last.result is not None and not isinstance(response, ErrorResponse):
            await fill_choices(response.choices, [last.result])
        return response

    return chat_completion_full_generator


def install_batch() -> None:
    """`/v1/chat/completions/batch`."""
    wrap(
        f"{BATCH}:OpenAIServingChatBatch.chat_completion_full_generator_batch",
        [  # Since 0.32, and before.
            (*_CHAT_BATCH, "parser_cls"),
            (*_CHAT_BATCH, "parser"),
        ],
        _chat_batch,
    )


def _chat_batch(stock: Stock) -> Stock:
    from vllm.entrypoints.openai.steering.read_choices import (
        LastResult,
        fill_choices,
    )
    from vllm.entrypoints.serve.engine.protocol import ErrorResponse

    async def chat_completion_full_generator_batch(
        self: GenerateBaseServing,
        request: OpenAIRequest,
        generators: list,
        *args: object,
        **kwargs: object,
    ) -> object:
        if not _may_read(self, request):
            return await stock(self, request, generators, *args, **kwargs)
        lasts = [LastResult() for _ in generators]
        watched = [last.watch(one) for last, one in zip(lasts, generators, strict=True)]
        response = await stock(self, request, watched, *args, **kwargs)
        results = [last.result for last in lasts if last.result is not None]
        if len(results) == len(lasts) and not isinstance(response, ErrorResponse):
            await fill_choices(response.choices, results)
        return response

    return chat_completion_full_generator_batch


def install_responses() -> None:
    """`/v1/responses`."""
    owner = f"{RESPONSES}:OpenAIServingResponses"
    wrap(f"{owner}.responses_full_generator", _RESPONSES_STREAM, _responses_full)
    wrap(f"{owner}.responses_stream_generator", _RESPONSES_STREAM, _responses_stream)


def _reading_of(context: ConversationContext) -> ResponseReading:
    """The `ResponseReading` of a conversation."""
    from vllm.entrypoints.openai.steering.read_choices import ResponseReading

    if context.sae_reading is None:
        context.sae_reading = ResponseReading()
    return context.sae_reading


def _responses_full(stock: Stock) -> Stock:
    from vllm.entrypoints.serve.engine.protocol import ErrorResponse

    async def responses_full_generator(
        self: GenerateBaseServing,
        request: OpenAIRequest,
        sampling_params: object,
        result_generator: object,
        context: ConversationContext,
        *args: object,
        **kwargs: object,
    ) -> object:
        response = await stock(
            self, request, sampling_params, result_generator, context, *args, **kwargs
        )
        reading = context.sae_reading
        if reading is not None and not isinstance(response, ErrorResponse):
            await reading.finish(response)
        return response

    return responses_full_generator


def _responses_stream(stock: Stock) -> Stock:
    def responses_stream_generator(
        self: GenerateBaseServing,
        request: OpenAIRequest,
        sampling_params: object,
        result_generator: object,
        context: ConversationContext,
        *args: object,
        **kwargs: object,
    ) -> AsyncIterator[RequestOutput]:
        events = stock(
            self, request, sampling_params, result_generator, context, *args, **kwargs
        )
        if not _may_read(self, request):
            return events
        return _reading_of(context).annotate(events)

    return responses_stream_generator


def install_context() -> None:
    """The conversations of `/v1/responses` collect what their turns have read."""
    for name in CONTEXTS:
        declare(f"{CONTEXT}:{name}", "sae_reading")
        wrap(f"{CONTEXT}:{name}.append_output", ("self", "output"), _append_output)


def _append_output(stock: Stock) -> Stock:
    def append_output(self: ConversationContext, output: RequestOutput) -> None:
        stock(self, output)
        if output.outputs and output.outputs[0].sae_features is not None:
            _reading_of(self).take(output)

    return append_output


def install_router(module: str) -> None:
    """Answers that carry features are written fast."""
    wrap(f"{module}:JSONResponse", _JSON_RESPONSE, _json_response)


def _json_response(stock: Stock) -> Stock:
    from vllm.entrypoints.serve.steering.answers import FeaturesAnswer, carries_features

    def json_response(content: object, *args: object, **kwargs: object) -> object:
        kind = FeaturesAnswer if carries_features(content) else stock
        return kind(content, *args, **kwargs)

    return json_response


SEAMS: tuple[tuple[str, Callable[[], None]], ...] = (
    (COMPLETION, install_completion),
    (CHAT, install_chat),
    (BATCH, install_batch),
    (RESPONSES, install_responses),
    (CONTEXT, install_context),
    *((module, functools.partial(install_router, module)) for module in ROUTERS),
)
