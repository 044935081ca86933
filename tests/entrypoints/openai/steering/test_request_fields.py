# SPDX-License-Identifier: Apache-2.0
"""HTTP routes: steering is carried or refused, on every route that generates."""

from __future__ import annotations

import asyncio
import json
import time
from argparse import Namespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from steering_testing.specs import CONFIG

import vllm.plugins.steering as plugin
from vllm.config.sae_steering_names import refuse_misspelt
from vllm.config.sae_steering_types import EXTRA_ARGS_KEYS
from vllm.exceptions import VLLMValidationError

plugin.install_front_end_seams()

from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest  # noqa: E402
from vllm.entrypoints.launchers.api_server.routers import (  # noqa: E402
    register_api_routers,
)
from vllm.entrypoints.launchers.run_batch import BatchRequestInput  # noqa: E402
from vllm.entrypoints.openai.chat_completion.protocol import (  # noqa: E402
    BatchChatCompletionRequest,
    ChatCompletionRequest,
)
from vllm.entrypoints.openai.completion.protocol import CompletionRequest  # noqa: E402
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest  # noqa: E402
from vllm.entrypoints.openai.steering.request_checks import (  # noqa: E402
    check_request,
)
from vllm.entrypoints.scale_out.token_in_token_out.protocol import (  # noqa: E402
    GenerateRequest,
)
from vllm.entrypoints.serve.exception_handling.register import (  # noqa: E402
    init_exception_handler,
)
from vllm.entrypoints.speech_to_text.realtime.connection import (  # noqa: E402
    RealtimeConnection,
)

MESSAGES = [{"role": "user", "content": "hello"}]
SPECS = {
    "sae_full_reconstruction_specs": [{"module_name": "a", "clamps": {"x": None}}],
    "sae_clamp_specs": [{"module_name": "b"}],
    "steering_vector_specs": [{"module_name": "c", "scale": 2.5}],
    "sae_readout_specs": [{"module_name": "d", "top_k": 2}],
}
CARRIERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "completions": (CompletionRequest, {"prompt": "hello"}),
    "chat": (ChatCompletionRequest, {"messages": MESSAGES}),
    "responses": (ResponsesRequest, {"input": "hello"}),
}
# Routes that generate, and what they do with steering.
CARRYING = {
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/chat/completions/batch",
    "/v1/responses",
    # These render one of the four above; the specs are in the rendered parameters.
    "/v1/completions/render",
    "/v1/chat/completions/render",
    "/v1/responses/render",
    # Reads the body itself, and validates it as one of the classes of the others.
    "/invocations",
}
REFUSING: dict[str, dict[str, Any]] = {
    "/v1/messages": {"model": "m", "messages": MESSAGES, "max_tokens": 1},
    "/v1/messages/render": {"model": "m", "messages": MESSAGES, "max_tokens": 1},
    "/inference/v1/generate": {"token_ids": [1], "sampling_params": {}},
    "/v1/systemone": {"state": "s", "questions": {}},
    "/generative_scoring": {"query": "q", "items": ["a"], "label_token_ids": [1]},
    "/v1/audio/transcriptions": {},
    "/v1/audio/translations": {},
}
NOT_GENERATING = {
    "/v1/chat/completions/derender",
    "/v1/completions/derender",
    "/v1/messages/count_tokens",
    "/v1/responses/{response_id}/cancel",
    "/inference/v1/abort_requests",
    "/tokenize",
    "/detokenize",
    "/ping",
    "/scale_elastic_ep",
    "/is_scaling_elastic_ep",
}


@pytest.fixture(scope="module")
def app() -> FastAPI:
    built = FastAPI()
    init_exception_handler(built)
    built.state.args = Namespace(log_error_stack=False, enable_scale_out=True)
    built.state.enable_server_load_tracking = False
    tasks = ("generate", "transcription", "realtime")
    register_api_routers(Namespace(), built, tasks)
    return built


@pytest.fixture(scope="module")
def client(app: FastAPI) -> TestClient:
    return TestClient(app, raise_server_exceptions=False)


def posts(app: FastAPI) -> set[str]:
    paths = app.openapi()["paths"]
    return {path for path, methods in paths.items() if "post" in methods}


def test_every_route_that_generates_is_known(app: FastAPI) -> None:
    assert posts(app) == CARRYING | set(REFUSING) | NOT_GENERATING


@pytest.mark.parametrize("key", EXTRA_ARGS_KEYS)
@pytest.mark.parametrize(
    "schema",
    [
        "CompletionRequest",
        "ChatCompletionRequest",
        "BatchChatCompletionRequest",
        "ResponsesRequest",
    ],
)
def test_carried_fields_are_in_the_openapi_schema(
    app: FastAPI, schema: str, key: str
) -> None:
    field = app.openapi()["components"]["schemas"][schema]["properties"][key]
    array, null = field["anyOf"]
    assert null == {"type": "null"}
    assert "module_name" in array["items"]["properties"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", CARRIERS)
def test_fields_reach_the_sampling_params(route: str, stream: bool) -> None:
    model, body = CARRIERS[route]
    request = model.model_validate({**body, **SPECS, "stream": stream})
    params = request.to_sampling_params(16, {})
    assert {key: params.extra_args[key] for key in EXTRA_ARGS_KEYS} == SPECS


@pytest.mark.parametrize("route", CARRIERS)
def test_fields_join_other_extra_args(route: str) -> None:
    model, body = CARRIERS[route]
    request = model.model_validate({**body, **SPECS, "vllm_xargs": {"mine": 1}})
    first = request.to_sampling_params(16, {}).extra_args
    assert first == {**SPECS, "mine": 1}
    # Several prompts of one request each get parameters of their own.
    assert request.to_sampling_params(16, {}).extra_args == first


@pytest.mark.parametrize("route", CARRIERS)
def test_without_fields_the_sampling_params_are_stock(route: str) -> None:
    model, body = CARRIERS[route]
    extra_args = model.model_validate(body).to_sampling_params(16, {}).extra_args
    assert not extra_args


@pytest.mark.parametrize("key", EXTRA_ARGS_KEYS)
@pytest.mark.parametrize("route", ["completions", "chat"])
def test_beam_search_with_steering_is_refused(route: str, key: str) -> None:
    model, body = CARRIERS[route]
    request = model.model_validate({**body, key: SPECS[key], "use_beam_search": True})
    with pytest.raises(VLLMValidationError) as caught:
        request.to_beam_search_params(16, {})
    assert caught.value.parameter == key


def test_beam_search_without_steering_is_stock() -> None:
    model, body = CARRIERS["completions"]
    request = model.model_validate({**body, "use_beam_search": True, "n": 2})
    assert request.to_beam_search_params(16, {}).beam_width == 2


def test_offline_beam_search_cannot_carry_specs() -> None:
    from vllm.sampling_params import BeamSearchParams

    with pytest.raises(TypeError):
        BeamSearchParams(beam_width=2, max_tokens=1, extra_args=SPECS)


def test_batch_chat_hands_the_fields_to_every_conversation() -> None:
    batch = BatchChatCompletionRequest(messages=[MESSAGES, MESSAGES], **SPECS)
    single = batch.to_chat_completion_request(MESSAGES)
    extra_args = single.to_sampling_params(16, {}).extra_args
    assert extra_args["steering_vector_specs"] == SPECS["steering_vector_specs"]
    assert set(extra_args) == set(EXTRA_ARGS_KEYS)


def test_batch_chat_hands_on_a_null_preset() -> None:
    body = {"model": "m", "messages": [MESSAGES, MESSAGES]}
    for given in ({"steering_preset": None}, {"steering_preset": "calm"}, {}):
        batch = BatchChatCompletionRequest.model_validate({**body, **given})
        made = batch.to_chat_completion_request(MESSAGES)
        params = made.to_sampling_params(16, {})
        assert (params.extra_args or {}) == given


def test_the_batch_runner_carries_the_fields() -> None:
    line = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions",
            "body": {"messages": MESSAGES, **SPECS}}  # fmt: skip
    body = BatchRequestInput.model_validate_json(json.dumps(line)).body
    assert set(body.to_sampling_params(16, {}).extra_args) == set(EXTRA_ARGS_KEYS)


def test_the_batch_runner_refuses_them_for_audio() -> None:
    for url in ("/v1/audio/transcriptions", "/v1/audio/translations"):
        line = {"custom_id": "1", "method": "POST", "url": url,
                "body": {"file_url": "data:,", **SPECS}}  # fmt: skip
        with pytest.raises(VLLMValidationError):
            BatchRequestInput.model_validate(line)


@pytest.mark.parametrize("key", EXTRA_ARGS_KEYS)
@pytest.mark.parametrize("route", REFUSING)
def test_other_routes_refuse_the_fields_with_400(
    client: TestClient, route: str, key: str
) -> None:
    body = REFUSING[route]
    if route.startswith("/v1/audio"):
        audio = {"file": ("a.wav", b"x")}
        response = client.post(route, data={key: "[]"}, files=audio)
    else:
        response = client.post(route, json={**body, key: SPECS[key]})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == key
    assert "does not support steering" in response.json()["error"]["message"]


@pytest.mark.parametrize("route", REFUSING)
def test_other_routes_refuse_a_misspelt_field(client: TestClient, route: str) -> None:
    if route.startswith("/v1/audio"):
        audio = {"file": ("a.wav", b"x")}
        response = client.post(route, data={"sae_clamp_spec": "[]"}, files=audio)
    else:
        body = {**REFUSING[route], "sae_clamp_spec": SPECS["sae_clamp_specs"]}
        response = client.post(route, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "sae_clamp_spec"
    assert "expected sae_clamp_specs" in response.json()["error"]["message"]


def test_null_fields_are_not_refused() -> None:
    null = dict.fromkeys(EXTRA_ARGS_KEYS)
    body = REFUSING["/v1/messages"]
    assert AnthropicMessagesRequest.model_validate({**body, **null}).max_tokens == 1


def test_raw_generate_carries_specs_in_extra_args() -> None:
    body = {"token_ids": [1], "sampling_params": {"extra_args": SPECS}}
    assert GenerateRequest.model_validate(body).sampling_params.extra_args == SPECS


def test_raw_generate_refuses_specs_beside_extra_args() -> None:
    body = {"token_ids": [1], "sampling_params": SPECS}
    with pytest.raises(VLLMValidationError) as caught:
        GenerateRequest.model_validate(body)
    assert caught.value.parameter == f"sampling_params.{EXTRA_ARGS_KEYS[0]}"
    body = {"token_ids": [1], "sampling_params": {"sae_clamp_spec": []}}
    with pytest.raises(VLLMValidationError, match="sampling_params.sae_clamp_spec: "):
        GenerateRequest.model_validate(body)


def test_rendered_parameters_carry_the_specs_to_raw_generate() -> None:
    params = CompletionRequest(prompt="x", **SPECS).to_sampling_params(16, {})
    sent = GenerateRequest(token_ids=[1], sampling_params=params).model_dump_json()
    received = GenerateRequest.model_validate_json(sent)
    assert received.sampling_params.extra_args == SPECS


@pytest.mark.parametrize("event", ["session.update", "input_audio_buffer.commit"])
def test_realtime_events_refuse_the_fields(event: str) -> None:
    connection = RealtimeConnection.__new__(RealtimeConnection)
    for field in ("sae_clamp_specs", "sae_clamp_spec"):
        message = {"type": event, "model": "m", field: SPECS["sae_clamp_specs"]}
        with pytest.raises(VLLMValidationError, match="sae_clamp_specs"):
            asyncio.run(connection.handle_event(message))


def test_a_hundred_thousand_unknown_fields_take_no_seconds() -> None:
    keys = [f"field_of_mine_{at}" for at in range(100_000)]
    start = time.process_time()
    refuse_misspelt(keys)
    assert time.process_time() - start < 2.0  # all of them compared took over 5
    # The words of our fields are found behind them, too.
    with pytest.raises(VLLMValidationError, match="expected sae_clamp_specs"):
        refuse_misspelt([*keys, "sae_clamp_spec"])


@pytest.mark.parametrize("route", CARRIERS)
def test_a_misspelt_field_is_refused_with_the_right_name(route: str) -> None:
    model, body = CARRIERS[route]
    for misspelt in ({"sae_clamp_spec": []}, {"vllm_xargs": {"sae_clamp_spec": 1}}):
        with pytest.raises(VLLMValidationError, match="expected sae_clamp_specs"):
            model.model_validate({**body, **misspelt}).to_sampling_params(16, {})


@pytest.mark.parametrize("outer", ["extra_body", "extra_args"])
@pytest.mark.parametrize("route", CARRIERS)
def test_a_field_that_is_one_level_too_deep_is_refused(route: str, outer: str) -> None:
    model, body = CARRIERS[route]
    nested = {**body, outer: SPECS, "stream": True}
    with pytest.raises(VLLMValidationError, match="at the top level of the body") as at:
        check_request(model.model_validate(nested), None)
    assert at.value.parameter == f"{outer}.sae_full_reconstruction_specs"


@pytest.mark.parametrize("value", [{}, "", 0, False])
@pytest.mark.parametrize("route", CARRIERS)
def test_what_is_no_list_is_refused_before_a_stream_begins(
    route: str, value: object
) -> None:
    model, body = CARRIERS[route]
    for field in EXTRA_ARGS_KEYS:
        request = model.model_validate({**body, field: value, "stream": True})
        with pytest.raises(VLLMValidationError, match="expected a list") as caught:
            check_request(request, CONFIG)
        assert caught.value.parameter == field
