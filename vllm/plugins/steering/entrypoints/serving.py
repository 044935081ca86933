# SPDX-License-Identifier: Apache-2.0
"""Seams into the serving classes: bad steering is a 400 for streams as well.

The edit a branch would make: `create_completion`, `create_chat_completion`,
`create_responses` and `serve_tokens` begin by checking the request's steering. Without
it the engine's own check comes after a stream has answered 200. A `model` that names a
preset is replaced there, and `show_available_models` lists the presets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.config.sae_steering_admission import refuse_reserved_key
from vllm.config.sae_steering_parser import parse_steering_request
from vllm.config.sae_steering_specs import READOUT_KEY
from vllm.config.steering_checks import refusal
from vllm.config.steering_json import Json
from vllm.engine.steering_active_config import active_steering_config
from vllm.exceptions import VLLMValidationError
from vllm.plugins.steering.seam import Stock, wrap

if TYPE_CHECKING:
    from fastapi import Request
    from pydantic import BaseModel

    from vllm.config import VllmConfig
    from vllm.entrypoints.generate.base.serving import GenerateBaseServing
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.entrypoints.serve.engine.protocol import ModelList
    from vllm.sampling_params import SamplingParams

_OPENAI = "vllm.entrypoints.openai"
TARGETS = (
    f"{_OPENAI}.completion.serving:OpenAIServingCompletion.create_completion",
    f"{_OPENAI}.chat_completion.serving:OpenAIServingChat.create_chat_completion",
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


def check_request(request: BaseModel, vllm_config: VllmConfig) -> Json:
    """The request's steering, in canonical form, under its fields.

    Args:
        request: an OpenAI request, or a raw one with `sampling_params`.
        vllm_config: of the engine that will run it.

    Raises:
        VLLMValidationError: the steering is not valid.
    """
    from vllm.entrypoints.openai.steering.request_fields import (
        refuse_beam_search,
        refuse_misspelt_fields,
        steering_of,
    )

    refuse_misspelt_fields(request)
    fields = dict(request)
    params: SamplingParams | None = fields.get("sampling_params")
    extra_args = fields.get("vllm_xargs")
    if params is not None:
        extra_args = params.extra_args
        refuse_reading(extra_args)
    refuse_reserved_key(extra_args)
    config = active_steering_config(vllm_config)
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
            "the answers of this route carry no features, use /v1/completions, "
            "/v1/chat/completions, /v1/responses or /v1/steering/encode",
        )


def _make(stock: Stock) -> Stock:
    from vllm.entrypoints.openai.steering.presets import select_preset
    from vllm.entrypoints.openai.steering.request_fields import refuse_ambiguous_body
    from vllm.entrypoints.serve.steering.metrics import count_refusal, count_request

    async def checked(
        self: GenerateBaseServing,
        request: BaseModel,
        raw_request: Request | None = None,
    ) -> object:
        try:
            config = active_steering_config(self.engine_client.vllm_config)
            select_preset(request, config, self.models.base_model_paths[0].name)
            steering = check_request(request, self.engine_client.vllm_config)
            await refuse_ambiguous_body(raw_request)
        except VLLMValidationError as error:
            count_refusal(error.parameter)
            return self.create_error_response(error)
        count_request(steering)
        return await stock(self, request, raw_request)

    return checked


def _make_show_available_models(stock: Stock) -> Stock:
    async def show_available_models(self: OpenAIServingModels) -> ModelList:
        from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelPermission

        models = await stock(self)
        config = active_steering_config(self.engine_client.vllm_config)
        base = self.base_model_paths[0]
        for name in () if config is None else config.presets:
            if not self.is_base_model(name):
                permission = [ModelPermission()]
                models.data.append(
                    ModelCard(
                        id=name, root=base.name, parent=base.name, permission=permission
                    )
                )
        return models

    return show_available_models
