# SPDX-License-Identifier: Apache-2.0
"""Seams into the OpenAI serving classes: what an answer holds of reading has a limit.

The edit a branch would make: where the prompts of a request have become tokens, and
nothing has been answered yet, refuse a request whose answer could be too long.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from vllm.engine.steering_active_config import active_steering_config
from vllm.exceptions import VLLMValidationError
from vllm.plugins.steering.entrypoints.reading_routes import (
    BATCH,
    CHAT,
    COMPLETION,
    RESPONSES,
)
from vllm.plugins.steering.seam import Signatures, Stock, wrap

if TYPE_CHECKING:
    from pydantic import BaseModel

    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
    from vllm.entrypoints.openai.steering.request_checks import AnswerTokens

    Serving: TypeAlias = (
        OpenAIServingCompletion | OpenAIServingChat | OpenAIServingResponses
    )

_RENDER: Signatures = ("self", "request")


class Route(NamedTuple):
    """What bounds the answer of one route.

    Attributes:
        prompt_field: the request's field with the prompts.
        prompts_of: gets the prompts from what the renderer returns.
        asked: gets the name and the value of the field with the tokens that a choice
            may have, from the serving object and the request.
        streams: whether a stream hands over what it has read, and keeps nothing.
    """

    prompt_field: str
    prompts_of: Stock
    asked: Stock
    streams: bool


def install_completion() -> None:
    """`/v1/completions`."""
    target = f"{COMPLETION}:OpenAIServingCompletion.render_completion_request"
    route = Route("prompt", lambda rendered: rendered, _max_tokens, streams=True)
    wrap(target, _RENDER, _limited(route))


def install_chat() -> None:
    """`/v1/chat/completions`."""
    target = f"{CHAT}:OpenAIServingChat.render_chat_request"
    route = Route("messages", lambda rendered: rendered[1], _max_tokens, streams=True)
    wrap(target, _RENDER, _limited(route))


def install_batch() -> None:
    """`/v1/chat/completions/batch`."""
    target = f"{BATCH}:OpenAIServingChatBatch.render_batch_chat_request"
    route = Route("messages", lambda rendered: rendered[2], _max_tokens, streams=False)
    wrap(target, _RENDER, _limited(route))


def install_responses() -> None:
    """`/v1/responses`, whose streams end with an event that has the whole answer."""
    route = Route(
        "input",
        lambda rendered: [rendered.engine_input],
        _max_output_tokens,
        streams=False,
    )
    wrap(
        f"{RESPONSES}:OpenAIServingResponses._render_resolved_response_inputs",
        ("self", "request", "prev_response", "skip_mm_cache"),
        _limited(route),
    )


def _value(request: BaseModel, name: str) -> int | None:
    return dict(request).get(name)


def _max_tokens(serving: Serving, request: BaseModel) -> tuple[str, int | None]:
    """As `asked` of `Route`. Chat requests have two fields; the newer one wins."""
    newer = _value(request, "max_completion_tokens")
    if newer is not None:
        return "max_completion_tokens", newer
    return "max_tokens", _value(request, "max_tokens")


def _max_output_tokens(
    serving: OpenAIServingResponses, request: BaseModel
) -> tuple[str, int | None]:
    """As `asked` of `Route`.

    A request that uses the server's own tools has several turns of that length. All of
    them together are within the model's length.
    """
    field = "max_output_tokens"
    has_turns = serving.tool_server is not None and _value(request, "tools")
    return field, None if has_turns else _value(request, field)


def _limited(route: Route) -> Callable[[Stock], Stock]:
    """Makes a renderer that refuses."""

    def make(stock: Stock) -> Stock:
        from vllm.entrypoints.openai.steering.read_choices import may_read
        from vllm.entrypoints.openai.steering.request_checks import check_answer
        from vllm.entrypoints.serve.engine.protocol import ErrorResponse
        from vllm.entrypoints.serve.steering.metrics import count_refusal

        async def render(
            self: Serving,
            request: BaseModel,
            *args: object,
            **kwargs: object,
        ) -> object:
            rendered = await stock(self, request, *args, **kwargs)
            if isinstance(rendered, ErrorResponse):
                return rendered
            config = active_steering_config(self.engine_client.vllm_config)
            if config is None or not may_read(request, config):
                return rendered
            lengths = [self._extract_prompt_len(p) for p in route.prompts_of(rendered)]
            try:
                check_answer(request, config, _tokens(self, route, request, lengths))
            except VLLMValidationError as error:
                count_refusal(error.parameter)
                return self.create_error_response(error)
            return rendered

        return render

    return make


def _tokens(
    serving: Serving,
    route: Route,
    request: BaseModel,
    lengths: Sequence[int],
) -> AnswerTokens:
    """The tokens whose values an answer may hold at once."""
    from vllm.entrypoints.openai.steering.request_checks import AnswerTokens

    field, asked = route.asked(serving, request)
    generated = 0
    if not (route.streams and _value(request, "stream")):
        longest = serving.model_config.max_model_len
        defaults = serving.default_sampling_params
        for length in lengths:
            # vLLM refuses a prompt that leaves no room.
            given = asked if asked is not None else defaults.get("max_tokens")
            limits = (longest - length, given, serving.override_max_tokens)
            generated += max(min(one for one in limits if one is not None), 0)
        generated *= _value(request, "n") or 1
    return AnswerTokens(route.prompt_field, lengths, field, generated)


SEAMS = (
    (COMPLETION, install_completion),
    (CHAT, install_chat),
    (BATCH, install_batch),
    (RESPONSES, install_responses),
)
