# SPDX-License-Identifier: Apache-2.0
"""Presets in OpenAI requests: as `model`, beside one, and in the list of models."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from steering_testing.specs import CONFIG, DELTA, FULL, entry

import vllm.plugins.steering as plugin
from vllm.config.parallel import ParallelConfig
from vllm.config.sae_steering_parser import parse_steering_request
from vllm.config.steering import SteeringConfig
from vllm.engine.steering_presets import with_preset
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.models.serving import (
    OpenAIModelRegistry,
    OpenAIServingModels,
)
from vllm.entrypoints.openai.steering.presets import select_preset
from vllm.entrypoints.openai.steering.request_checks import check_request
from vllm.exceptions import VLLMValidationError

plugin.install_front_end_seams()

HINTS = {"temperature": 0.25, "max_tokens": 7}
BRIDGE = {FULL: [{"module_name": "one"}], "sampling": HINTS}
CALM = {DELTA: [{"module_name": "one", "clamps": [entry(9, value=3.0)]}]}
SERVED = ["base", "alias", "adapter"]


def presets(**given: Any) -> SteeringConfig:
    config = CONFIG
    for name, preset in given.items():
        config = with_preset(config, {"name": name, "preset": preset})
    return config


PRESETS = presets(bridge=BRIDGE, calm=CALM, alias=CALM, adapter=CALM)


def selected(config: SteeringConfig = PRESETS, **fields: Any) -> CompletionRequest:
    request = CompletionRequest(prompt="x", **fields)
    select_preset(request, config, SERVED)
    check_request(request, config)
    return request


def test_a_model_that_is_a_preset_becomes_the_base_model() -> None:
    request = selected(model="bridge")
    assert request.model == "base"
    sampled = request.to_sampling_params(16, {})
    assert sampled.extra_args == {"steering_preset": "bridge"}
    assert sampled.temperature == 0.25
    assert request.max_tokens == 7
    assert selected(model="bridge", temperature=0).temperature == 0
    plain = selected(model="base")
    assert plain.to_sampling_params(16, {}).extra_args in (None, {})


@pytest.mark.parametrize("name", ["alias", "adapter"])
def test_a_model_of_the_server_is_no_preset_of_that_name(name: str) -> None:
    request = selected(model=name)
    assert request.model == name
    assert request.to_sampling_params(16, {}).extra_args in (None, {})
    chosen = selected(model=name, steering_preset=name)
    assert chosen.model == name
    carried = chosen.to_sampling_params(16, {}).extra_args
    assert carried == {"steering_preset": name}


def test_a_null_preset_is_carried() -> None:
    sampled = selected(steering_preset=None).to_sampling_params(16, {})
    assert sampled.extra_args == {"steering_preset": None}


def test_two_presets_of_one_request_are_refused() -> None:
    with pytest.raises(VLLMValidationError, match="expected only one of them"):
        selected(model="bridge", steering_preset="calm")
    assert selected(model="bridge", steering_preset="bridge").model == "base"


def test_beam_search_under_a_default_is_refused() -> None:
    config = replace(PRESETS, default_preset="calm")
    with pytest.raises(VLLMValidationError, match="beam search"):
        selected(config, use_beam_search=True)
    assert selected(config, use_beam_search=True, steering_preset=None)


def test_beams_opt_out_of_a_default_that_comes_while_they_run() -> None:
    from vllm.entrypoints.generate.beam_search import online

    params = online.SamplingParams(logprobs=4, max_tokens=1)
    config = replace(PRESETS, default_preset="calm")
    assert parse_steering_request(params.extra_args, config) is None
    assert parse_steering_request(None, config) is not None
    assert parse_steering_request(params.extra_args, None) is None


def test_presets_are_listed_as_models() -> None:
    config: Any = SimpleNamespace(
        additional_config={
            "steering": {"resolved": presets(b=BRIDGE, c=CALM).to_json()}
        },
        parallel_config=ParallelConfig(),
        model_config=SimpleNamespace(max_model_len=9),
    )
    base: Any = SimpleNamespace(name="base", model_path="x")
    serving = OpenAIServingModels.__new__(OpenAIServingModels)
    serving.engine_client = SimpleNamespace(vllm_config=config)  # type: ignore
    serving.base_model_paths = [base]
    serving.registry = OpenAIModelRegistry(config.model_config, [base])
    serving.lora_requests = {}

    def listed() -> list[tuple[str, str | None]]:
        cards = asyncio.run(serving.show_available_models()).data
        return [(card.id, card.root) for card in cards]

    assert listed() == [("base", "x"), ("b", "base"), ("c", "base")]
    adapter: Any = SimpleNamespace(lora_name="c", path="y", base_model_name=None)
    serving.lora_requests["c"] = adapter
    assert listed() == [("base", "x"), ("c", "y"), ("b", "base")]
