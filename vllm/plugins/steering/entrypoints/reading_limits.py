# SPDX-License-Identifier: Apache-2.0
"""Seams into the OpenAI serving classes: what an answer holds of prompts has a limit.

The edit a branch would make: where the prompts of a request have become tokens, and
nothing has been answered yet, refuse a request whose answer would be too long.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

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

    from vllm.entrypoints.generate.base.serving import GenerateBaseServing

_RENDER: Signatures = ("self", "request")


def install_completion() -> None:
    """`/v1/completions`."""
    target = f"{COMPLETION}:OpenAIServingCompletion.render_completion_request"
    wrap(target, _RENDER, _limited("prompt", lambda rendered: rendered))


def install_chat() -> None:
    """`/v1/chat/completions`."""
    target = f"{CHAT}:OpenAIServingChat.render_chat_request"
    wrap(target, _RENDER, _limited("messages", lambda rendered: rendered[1]))


def install_batch() -> None:
    """`/v1/chat/completions/batch`."""
    target = f"{BATCH}:OpenAIServingChatBatch.render_batch_chat_request"
    wrap(target, _RENDER, _limited("messages", lambda rendered: rendered[2]))


def install_responses() -> None:
    """`/v1/responses`."""
    wrap(
        f"{RESPONSES}:OpenAIServingResponses._render_resolved_response_inputs",
        ("self", "request", "prev_response", "skip_mm_cache"),
        _limited("input", lambda rendered: [rendered.engine_input]),
    )


def _limited(field: str, prompts_of: Stock) -> Callable[[Stock], Stock]:
    """Makes a renderer that refuses.

    Args:
        field: the request's field with the prompts.
        prompts_of: gets the prompts from what the renderer returns.
    """

    def make(stock: Stock) -> Stock:
        from vllm.entrypoints.openai.steering.request_checks import check_prompts
        from vllm.entrypoints.serve.engine.protocol import ErrorResponse
        from vllm.entrypoints.serve.steering.metrics import count_refusal

        async def render(
            self: GenerateBaseServing,
            request: BaseModel,
            *args: object,
            **kwargs: object,
        ) -> object:
            rendered = await stock(self, request, *args, **kwargs)
            if isinstance(rendered, ErrorResponse):
                return rendered
            lengths = map(self._extract_prompt_len, prompts_of(rendered))
            config = active_steering_config(self.engine_client.vllm_config)
            try:
                check_prompts(request, config, field, lengths)
            except VLLMValidationError as error:
                count_refusal(error.parameter)
                return self.create_error_response(error)
            return rendered

        return render

    return make


SEAMS = (
    (COMPLETION, install_completion),
    (CHAT, install_chat),
    (BATCH, install_batch),
    (RESPONSES, install_responses),
)
