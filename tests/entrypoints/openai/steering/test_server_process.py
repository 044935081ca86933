# SPDX-License-Identifier: Apache-2.0
"""Steering through a real server process: carried, refused, never dropped.

The oracle is an engine in this process, given the same requests.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
from steering_testing.golden_gate import (
    BAD,
    BODIES,
    CLAMP,
    EXAMPLE,
    FULL,
    MESSAGES,
    MODES,
    MODULE,
    PROMPT,
    ROUTES,
    TOKENS,
    ask_chat,
    ask_completions,
    entry,
    example_engine,
    spec,
)
from steering_testing.server import MODEL_NAME, Server, api_server

from vllm import SamplingParams
from vllm.config.sae_steering_types import EXTRA_ARGS_KEYS

pytestmark = pytest.mark.server


# --- What the in-process engine says ------------------------------------------


@pytest.fixture(scope="module")
def expected() -> dict[str, dict[str, list[str]]]:
    """Greedy texts by kind of prompt and mode, and two sampled ones of n=2."""

    def texts(run: Callable[..., Any], prompt: Any, **options: Any) -> Any:
        sampling = [
            SamplingParams(max_tokens=TOKENS, extra_args=specs or None, **options)
            for specs in MODES.values()
        ]
        outputs = run([prompt] * len(MODES), sampling, use_tqdm=False)
        found = [[choice.text for choice in output.outputs] for output in outputs]
        return dict(zip(MODES, found, strict=True))

    with example_engine() as llm:
        # The responses route adds the tokenizer's bos to the one of the template.
        rendered = llm.get_tokenizer().apply_chat_template(
            MESSAGES, tokenize=False, add_generation_prompt=True
        )
        return {
            "text": texts(llm.generate, PROMPT, temperature=0),
            "chat": texts(llm.chat, MESSAGES, temperature=0),
            "responses": texts(llm.generate, rendered, temperature=0),
            "two": texts(llm.generate, PROMPT, temperature=0.8, seed=5, n=2),
        }


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    made = openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="-", max_retries=0, timeout=60
    )
    with made:
        yield made


# --- Asking, as an OpenAI client does -----------------------------------------


def test_the_modes_differ_in_the_oracle(
    expected: dict[str, dict[str, list[str]]],
) -> None:
    for kind in ("text", "chat", "responses"):
        texts = {mode: found[0] for mode, found in expected[kind].items()}
        assert texts["clamped"].count("bridge") > texts["plain"].count("bridge")
        assert len({texts["plain"], texts["clamped"], texts["decode_only"]}) == 3


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("route", ROUTES)
def test_a_route_says_what_the_in_process_engine_says(
    client: openai.OpenAI,
    expected: dict[str, dict[str, list[str]]],
    route: str,
    stream: bool,
    mode: str,
) -> None:
    ask, kind = ROUTES[route]
    assert ask(client, MODES[mode], stream) == expected[kind][mode][0]


def test_a_preset_is_a_model_for_any_client(
    client: openai.OpenAI, expected: dict[str, dict[str, list[str]]]
) -> None:
    """The preset's name and nothing else: it also gives the sampling."""
    assert "clamped" in [model.id for model in client.models.list()]
    completion = client.completions.create(model="clamped", prompt=PROMPT)
    assert completion.choices[0].text == expected["text"]["clamped"][0]
    chunks = client.chat.completions.create(
        model="clamped", messages=MESSAGES, stream=True
    )
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert said == expected["chat"]["clamped"][0]
    response = client.responses.create(model="clamped", input=MESSAGES)
    assert response.output_text == expected["responses"]["clamped"][0]


@pytest.mark.parametrize("name", ["clamped", None])
def test_a_preset_is_a_field_too(
    client: openai.OpenAI,
    expected: dict[str, dict[str, list[str]]],
    name: str | None,
) -> None:
    asked = {"steering_preset": name}
    mode = "plain" if name is None else "clamped"
    for stream in (False, True):
        assert ask_completions(client, asked, stream) == expected["text"][mode][0]


def test_several_choices_are_all_steered(
    client: openai.OpenAI, expected: dict[str, dict[str, list[str]]]
) -> None:
    for mode in ("plain", "clamped"):
        reply = client.completions.create(
            model=MODEL_NAME,
            prompt=PROMPT,
            max_tokens=TOKENS,
            temperature=0.8,
            seed=5,
            n=2,
            extra_body=MODES[mode],
        )
        assert [choice.text for choice in reply.choices] == expected["two"][mode]


def test_batch_chat_steers_every_conversation(
    http: httpx.Client, expected: dict[str, dict[str, list[str]]]
) -> None:
    body = {
        "model": MODEL_NAME,
        "messages": [MESSAGES, MESSAGES],
        "max_tokens": TOKENS,
        "temperature": 0,
    }
    reply = http.post("/v1/chat/completions/batch", json=body | MODES["clamped"])
    texts = [choice["message"]["content"] for choice in reply.json()["choices"]]
    assert texts == expected["chat"]["clamped"] * 2


def test_concurrent_requests_keep_to_their_own_steering(
    server: Server, expected: dict[str, dict[str, list[str]]]
) -> None:
    order = [*MODES] * 6

    async def ask_all() -> list[str]:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            body = {"model": MODEL_NAME, "prompt": PROMPT, "max_tokens": TOKENS}
            replies = await asyncio.gather(
                *(
                    client.post(
                        "/v1/completions",
                        json={**body, "temperature": 0, **MODES[mode]},
                    )
                    for mode in order
                )
            )
        return [reply.json()["choices"][0]["text"] for reply in replies]

    assert asyncio.run(ask_all()) == [expected["text"][mode][0] for mode in order]


# --- The schema ---------------------------------------------------------------


def test_the_fields_are_in_the_openapi_document(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    for path in BODIES:
        content = document["paths"][path]["post"]["requestBody"]["content"]
        name = content["application/json"]["schema"]["$ref"].rpartition("/")[2]
        properties = document["components"]["schemas"][name]["properties"]
        for key in EXTRA_ARGS_KEYS:
            assert "module_name" in json.dumps(properties[key]), (path, key)


# --- Refusals -----------------------------------------------------------------


def assert_refused(reply: httpx.Response, path: str) -> None:
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error["param"] == path
    assert path in error["message"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("route", BODIES)
@pytest.mark.parametrize("case", BAD)
def test_a_bad_value_is_400_with_the_path_of_the_field(
    http: httpx.Client, case: str, route: str, stream: bool
) -> None:
    asked, path = BAD[case]
    body = {"model": MODEL_NAME, "stream": stream, **BODIES[route], **asked}
    assert_refused(http.post(route, json=body), path)


@pytest.mark.parametrize("route", BODIES)
def test_a_nan_in_the_body_is_400(http: httpx.Client, route: str) -> None:
    asked = {FULL: [spec(clamps=[entry(value=float("nan"))])]}
    content = json.dumps({"model": MODEL_NAME, **BODIES[route], **asked})
    headers = {"content-type": "application/json"}
    reply = http.post(route, content=content, headers=headers)
    assert_refused(reply, f"{CLAMP}.value")


@pytest.mark.parametrize("route", BODIES)
def test_a_body_with_two_meanings_is_400(http: httpx.Client, route: str) -> None:
    asked = {FULL: [spec(clamps=[entry(feature_idx=0)])]}
    content = json.dumps({"model": MODEL_NAME, **BODIES[route], **asked})
    headers = {"content-type": "application/json"}
    minus = content.replace('"feature_idx": 0', '"feature_idx": -0')
    assert_refused(
        http.post(route, content=minus, headers=headers), f"{CLAMP}.feature_idx"
    )
    twice = content.replace('"kind"', '"kind": "scale", "kind"')
    assert_refused(http.post(route, content=twice, headers=headers), f"{CLAMP}.kind")


@pytest.mark.parametrize("route", BODIES)
def test_a_misspelt_field_is_400_with_the_right_name(
    http: httpx.Client, route: str
) -> None:
    body = {"model": MODEL_NAME, **BODIES[route], FULL[:-1]: [spec()]}
    assert_refused(http.post(route, json=body), FULL[:-1])


def test_the_openai_client_shows_the_path(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask_chat(client, {FULL: [spec(module_name="x")]}, False)
    assert caught.value.param == f"{FULL}[0].module_name"
    assert MODULE in caught.value.message


@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions"])
def test_beam_search_with_steering_is_400(http: httpx.Client, route: str) -> None:
    beams = {"use_beam_search": True, "n": 2, "temperature": 0}
    body = {"model": MODEL_NAME, **BODIES[route], **beams}
    assert http.post(route, json=body).status_code == 200
    assert_refused(http.post(route, json=body | MODES["clamped"]), FULL)


def test_a_route_that_cannot_steer_refuses(http: httpx.Client) -> None:
    body = {"model": MODEL_NAME, "messages": MESSAGES, "max_tokens": 4}
    assert http.post("/v1/messages", json=body).status_code == 200
    assert_refused(http.post("/v1/messages", json=body | MODES["clamped"]), FULL)


# --- The server survives ------------------------------------------------------


def test_after_a_hundred_concurrent_bad_requests_a_good_one_is_served(
    server: Server,
    client: openai.OpenAI,
    expected: dict[str, dict[str, list[str]]],
) -> None:
    bodies = [
        (route, {"model": MODEL_NAME, **body, **asked})
        for asked, _ in BAD.values()
        for route, body in BODIES.items()
    ]

    async def ask_all() -> list[int]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(
            base_url=server.url, timeout=60, limits=limits
        ) as asking:
            replies = await asyncio.gather(
                *(asking.post(route, json=body) for route, body in (bodies * 3)[:100])
            )
        return [reply.status_code for reply in replies]

    assert asyncio.run(ask_all()) == [400] * 100
    found = ask_completions(client, MODES["clamped"], False)
    assert found == expected["text"]["clamped"][0]


def test_after_clients_that_hang_up_a_good_one_is_served(
    http: httpx.Client,
    client: openai.OpenAI,
    expected: dict[str, dict[str, list[str]]],
) -> None:
    body = {
        "model": MODEL_NAME,
        "prompt": PROMPT,
        "max_tokens": 200,
        "stream": True,
        "ignore_eos": True,
        **MODES["clamped"],
    }
    for _ in range(5):
        with http.stream("POST", "/v1/completions", json=body) as reply:
            assert next(reply.iter_lines()).startswith("data:")
    found = ask_completions(client, MODES["clamped"], False)
    assert found == expected["text"]["clamped"][0]


@pytest.fixture(scope="module")
def stock_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("stock") / "log"
    with api_server(EXAMPLE / "model", log) as running:
        yield running


@pytest.mark.slow
def test_a_server_without_steering_refuses_and_says_how_to_start_it(
    stock_server: Server, expected: dict[str, dict[str, list[str]]]
) -> None:
    with httpx.Client(base_url=stock_server.url, timeout=60) as http:
        for route, body in BODIES.items():
            asked = {"model": MODEL_NAME, **body, **MODES["clamped"]}
            for stream in (False, True):
                reply = http.post(route, json={**asked, "stream": stream})
                assert_refused(reply, FULL)
                assert "--steering-modules" in reply.json()["error"]["message"]
        plain = {"model": MODEL_NAME, "prompt": PROMPT, "max_tokens": TOKENS}
        reply = http.post("/v1/completions", json={**plain, "temperature": 0})
    assert reply.json()["choices"][0]["text"] == expected["text"]["plain"][0]
