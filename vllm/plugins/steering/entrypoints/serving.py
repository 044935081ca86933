# SPDX-License-Identifier: Apache-2.0
"""Seams into the serving classes: bad steering is a 400 for streams as well.

The edit a branch would make: `create_completion`, `create_chat_completion`,
`create_batch_chat_completion`, `create_responses` and `serve_tokens` begin by checking
the request's steering. Without this, the engine's own check comes after a stream has
answered 200. They also replace a `model` that names a preset, and
`show_available_models` lists the presets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.engine.steering_active_config import active_steering_config
from vllm.exceptions import VLLMValidationError
from vllm.plugins.steering.seam import Stock, wrap

if TYPE_CHECKING:
    from fastapi import Request
    from pydantic import BaseModel

    from vllm.entrypoints.generate.base.serving import GenerateBaseServing
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.entrypoints.serve.engine.protocol import ModelList

_OPENAI = "vllm.entrypoints.openai"
_BATCH = f"{_OPENAI}.chat_completion.batch_serving"
TARGETS = (
    f"{_OPENAI}.completion.serving:OpenAIServingCompletion.create_completion",
    f"{_OPENAI}.chat_completion.serving:OpenAIServingChat.create_chat_completion",
    f"{_BATCH}:OpenAIServingChatBatch.create_batch_chat_completion",
    f"{_OPENAI}.responses.serving:OpenAIServingResponses.create_responses",
    "vllm.entrypoints.scale_out.token_in_token_out.serving:ServingTokens.serve_tokens",
)


class Installer:
    """Binds one of `TARGETS`."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.module = target.partition(":")[0]

    def __call__(self) -> None:
        wrap(self.target, ("self", "request", "raw_request"), _make)


class ModelsInstaller:
    """Binds the list of models."""

    module = "vllm.entrypoints.openai.models.serving"

    def __call__(self) -> None:
        target = f"{self.module}:OpenAIServingModels.show_available_models"
        wrap(target, ("self",), _make_show_available_models)


INSTALLERS: tuple[Installer | ModelsInstaller, ...] = (
    *(Installer(target) for target in TARGETS),
    ModelsInstaller(),
)


def _make(stock: Stock) -> Stock:
    from vllm.entrypoints.openai.steering.presets import select_preset
    from vllm.entrypoints.openai.steering.request_checks import checked_request
    from vllm.entrypoints.serve.steering.metrics import count_refusal, count_request

    async def checked(
        self: GenerateBaseServing,
        request: BaseModel,
        raw_request: Request | None = None,
    ) -> object:
        try:
            config = active_steering_config(self.engine_client.vllm_config)
            select_preset(request, config, _served(self.models))
            steering = await checked_request(request, config, raw_request)
        except VLLMValidationError as error:
            count_refusal(error.parameter)
            return self.create_error_response(error)
        count_request(steering)
        return await stock(self, request, raw_request)

    return checked


def _served(models: OpenAIServingModels) -> list[str]:
    """Names of the base model, then of the adapters that are loaded."""
    return [*(path.name for path in models.base_model_paths), *models.lora_requests]


def _make_show_available_models(stock: Stock) -> Stock:
    from vllm.entrypoints.openai.steering.presets import preset_cards

    async def show_available_models(self: OpenAIServingModels) -> ModelList:
        models = await stock(self)
        config = active_steering_config(self.engine_client.vllm_config)
        models.data += preset_cards(config, _served(self))
        return models

    return show_available_models
