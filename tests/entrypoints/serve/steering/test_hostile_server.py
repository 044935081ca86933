# SPDX-License-Identifier: Apache-2.0
"""Clients that mean ill, beside a stream that must go on: a real server."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from soak.over_http import tracebacks
from steering_testing.golden_gate import (
    DELTA,
    EXAMPLE,
    FULL,
    MODULE,
    example_server,
)
from steering_testing.server import MODEL_NAME, Server

pytestmark = pytest.mark.server

MODULES = "/v1/steering/modules"
ENCODE = "/v1/steering/encode"
KEY = {"Authorization": "Bearer the-key"}
JSON = {"Content-Type": "application/json"}
CLAMP = {"feature_idx": 457, "kind": "absolute", "value": 9.4}
SPEC = {"module_name": MODULE, "clamps": [CLAMP]}
TEXTS = {"module_name": MODULE, "input": ["the chef " * 50] * 64, "top_k": 64}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose module has 16384 labels, and another one broken files."""
    root = tmp_path_factory.mktemp("root").resolve()
    for name in ("good", "broken"):
        shutil.copytree(EXAMPLE / "sae", root / name)
    labels = {str(at): "mentions of the bridge" for at in range(16384)}
    (root / "good" / "labels.json").write_text(json.dumps(labels))
    (root / "broken" / "labels.json").write_text("[1, 2")
    (root / "broken" / "evidence.json").write_text('{"card": {"a": "\\ud800"}}')
    modules = {MODULE: str(root / "good"), "broken": str(root / "broken")}
    steering = {"modules": modules, "module_roots": [str(root)]}
    options = ("--steering-api-key", "the-key")
    with example_server(root / "log", *options, steering=steering) as running:
        yield running
        assert tracebacks(running.log) == []


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=120) as client:
        yield client


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL_NAME, "prompt": "the chef", "max_tokens": 2, **fields}


def ask_all(server: Server, count: int, ask: Callable[..., Any]) -> list[Any]:
    """The answers, or errors, of many clients at once."""

    async def run() -> list[Any]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(
            base_url=server.url, timeout=120, limits=limits
        ) as client:
            asked = (ask(client) for _ in range(count))
            return await asyncio.gather(*asked, return_exceptions=True)

    return asyncio.run(run())


def metric(http: httpx.Client, start: str) -> float:
    lines = http.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(start))


def test_texts_of_clients_that_left_are_not_encoded(
    server: Server, http: httpx.Client
) -> None:
    tokens_read = "vllm:prompt_tokens_total"
    before = metric(http, tokens_read)

    async def leave(client: httpx.AsyncClient) -> None:
        await client.post(ENCODE, json=TEXTS, timeout=0.5)

    left = ask_all(server, 24, leave)
    assert any(isinstance(one, httpx.TimeoutException) for one in left)
    deadline = time.monotonic() + 30
    while (held := metric(http, "vllm:num_requests_")) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert held == 0
    # Most of these texts, of 101 tokens each, were never read.
    assert metric(http, tokens_read) - before < 24 * 64 * 101 / 2


def test_bodies_that_end_in_the_middle_are_no_errors(server: Server) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    for call in (f"POST {MODULES}", f"POST {ENCODE}", "PUT /v1/steering/presets/x"):
        for _ in range(3):
            with socket.create_connection((host, int(port))) as connection:
                head = f"{call} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer the-key"
                connection.sendall(f"{head}\r\nContent-Length: 99\r\n\r\n{{".encode())
                time.sleep(0.05)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/completions"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/responses"),
        ("POST", "/v1/messages"),
        ("POST", "/invocations"),
        ("POST", "/tokenize"),
        ("POST", ENCODE),
        ("POST", MODULES),
        ("PUT", "/v1/steering/presets/x"),
    ],
)
@pytest.mark.parametrize("depth", [980, 100_000])
def test_nested_bodies_are_refused_on_every_route(
    http: httpx.Client, method: str, path: str, depth: int
) -> None:
    deep = "[" * depth + "]" * depth
    for body in (deep, f'{{"sae_clamp_specs": {deep}, "prompt": "a", "name": "a"}}'):
        answer = http.request(method, path, content=body, headers={**KEY, **JSON})
        assert answer.status_code == 400, (path, answer.text)
        if depth > 1000:
            error = answer.json()["error"]
            assert error["code"] == 400
            assert "body: found JSON that is nested too deep" in error["message"]


TEXT = "a\ud800"
CHAT = {"model": MODEL_NAME, "messages": [{"role": "user", "content": TEXT}]}
HALVES: list[tuple[str, dict[str, Any], str]] = [
    (ENCODE, {"module_name": MODULE, "input": ["a", TEXT]}, "input[1]"),
    (ENCODE, {**CHAT, "module_name": MODULE}, "messages[0].content"),
    (MODULES, {"name": TEXT, "path": "/x"}, "name"),
    ("/v1/steering/presets/x", {"description": TEXT}, "description"),
    ("/v1/completions", completion(prompt=TEXT, **{DELTA: [SPEC]}), "prompt"),
    ("/v1/completions", completion(stop=["a", TEXT]), "stop[1]"),
    ("/v1/completions", completion(model=TEXT, stream=True), "model"),
    ("/v1/completions", completion(request_id=TEXT), "request_id"),
    ("/v1/completions", completion(vllm_xargs={"a": TEXT}), "vllm_xargs.a"),
    ("/v1/completions", completion(bad_words=[TEXT]), "bad_words[0]"),
    (
        "/v1/completions",
        completion(**{DELTA: [{**SPEC, "module_name": TEXT}]}),
        f"{DELTA}[0].module_name",
    ),
    ("/v1/chat/completions", CHAT, "messages[0].content"),
    ("/v1/chat/completions", {**CHAT, "stream": True}, "messages[0].content"),
    ("/v1/responses", {"input": TEXT}, "input"),
    ("/v1/messages", {**CHAT, "max_tokens": 1}, "messages[0].content"),
    ("/invocations", completion(prompt=TEXT), "prompt"),
    ("/tokenize", {"model": MODEL_NAME, "prompt": TEXT}, "prompt"),
]


@pytest.mark.parametrize(("path", "body", "field"), HALVES)
def test_half_of_a_surrogate_pair_is_refused_by_field_on_every_route(
    http: httpx.Client, path: str, body: dict[str, Any], field: str
) -> None:
    method = "PUT" if "presets" in path else "POST"
    content = json.dumps(body)
    answer = http.request(method, path, content=content, headers={**KEY, **JSON})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == field
    assert error["message"].startswith(f"{field}: found 'a\\ud800', which has half")
    assert error["message"].endswith("expected Unicode text")


def test_who_only_looks_does_not_stop_a_stream(
    server: Server, http: httpx.Client
) -> None:
    """A stream ends while 200 clients list modules, presets, labels and evidence."""
    looks = (
        *(MODULES, "/v1/steering/presets", f"{MODULES}/{MODULE}/evidence?index=1"),
        f"{MODULES}/{MODULE}/features?q={'bridge+' * 30}zzz",
    )

    async def look(client: httpx.AsyncClient) -> list[int]:
        return [(await client.get(path)).status_code for path in looks]

    async def stream(client: httpx.AsyncClient) -> str:
        body = completion(max_tokens=40, ignore_eos=True, stream=True)
        body[DELTA] = [SPEC]
        lines = []
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            async for line in answer.aiter_lines():
                lines.append(line)
        return next(line for line in reversed(lines) if line)

    async def both(client: httpx.AsyncClient) -> tuple[str, list[int]]:
        last, statuses = await asyncio.gather(stream(client), look(client))
        return last, statuses

    found = ask_all(server, 50, both)
    assert all(one == ("data: [DONE]", [200] * 4) for one in found), found[:3]
    assert http.get(MODULES).status_code == 200


def test_a_body_of_33_mib_is_refused_before_it_is_parsed(http: httpx.Client) -> None:
    """Here `[[[…]]]` beside steering; parsing it would hold every stream for long."""
    body = json.dumps(completion(prompt=[[1]] * (33 << 18), **{DELTA: [SPEC]}))
    assert len(body) > 33 << 20
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize"):
        began = time.monotonic()
        answer = http.post(path, content=body)
        assert answer.status_code == 413
        assert answer.json()["error"]["message"].startswith("body: found ")
        assert "max_body_mib" in answer.json()["error"]["message"]
        assert time.monotonic() - began < 5


def test_a_long_query_is_refused(http: httpx.Client) -> None:
    answer = http.get(f"{MODULES}/{MODULE}/features?q={'e+' * 20_000}zzz")
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("q: found 40003 characters")


def test_broken_files_do_not_say_where_they_are(http: httpx.Client) -> None:
    for path in ("features?q=a", "evidence?index=0"):
        answer = http.get(f"{MODULES}/broken/{path}")
        assert answer.status_code == 409, answer.text
        assert "json" in answer.text and "/" not in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({DELTA: [{**SPEC, "clamps": [CLAMP] * 10_000}]}, "1 sites and 10000 clamps"),
        (
            {
                DELTA: [
                    {**SPEC, "clamps": {"post_block": dict.fromkeys(range(9999), [])}}
                ]
            },
            "9999 sites and 0 clamps",
        ),
        ({DELTA: [SPEC] * 10_000}, "found 10000 specs"),
        ({DELTA: [{**SPEC, "spans": [{"of": "prompt"}] * 9999}]}, "found 9999 items"),
        ({DELTA: [{**SPEC, "module_name": "<script>"}]}, "found '<script>'"),
        ({DELTA: [{**SPEC, "clamps": [{**CLAMP, "value": 1e999}]}]}, "found inf"),
    ],
)
def test_absurd_specs_are_refused_with_what_was_found(
    http: httpx.Client, fields: dict[str, Any], found: str
) -> None:
    headers = {"Content-Type": "application/json"}
    body = json.dumps(completion(**fields))
    answer = http.post("/v1/completions", content=body, headers=headers)
    assert answer.status_code == 400
    assert found in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"].startswith(DELTA)


def test_forty_registrations_at_once_are_all_answered(
    server: Server, http: httpx.Client
) -> None:
    path = http.get(f"{MODULES}/{MODULE}", headers=KEY).json()["module"]["path"]
    body = {"name": "hot", "path": path, "replace": True}

    async def register(client: httpx.AsyncClient) -> int:
        return (await client.post(MODULES, json=body, headers=KEY)).status_code

    assert set(ask_all(server, 40, register)) == {201}
    assert http.delete(f"{MODULES}/hot", headers=KEY).status_code == 200


def test_beams_are_plain_whatever_default_comes(http: httpx.Client) -> None:
    beams = {"use_beam_search": True, "n": 2, "max_tokens": 24, "temperature": 0}
    asked = completion(**beams, steering_preset=None)

    def text(body: dict[str, Any]) -> str:
        answer = http.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["text"]

    plain = text(asked)
    preset, default = "/v1/steering/presets/bridge", "/v1/steering/default_preset"
    assert http.put(preset, json={FULL: [SPEC]}, headers=KEY).status_code == 200
    wanted = {"preset": "bridge"}
    assert http.put(default, json=wanted, headers=KEY).status_code == 200
    try:
        assert "bridge" in text(completion(max_tokens=24, temperature=0))
        assert "bridge" not in plain
        assert text(asked) == plain
        del asked["steering_preset"]
        assert http.post("/v1/completions", json=asked).status_code == 400
    finally:
        none = {"preset": None}
        assert http.put(default, json=none, headers=KEY).status_code == 200
        assert http.delete(preset, headers=KEY).status_code == 200


def test_at_the_end_nothing_is_held(http: httpx.Client) -> None:
    assert http.post("/v1/completions", json=completion()).status_code == 200
    listed = http.get(MODULES).json()
    assert sum(listed["rows_in_use"].values()) == 0
    assert [module["requests"] for module in listed["modules"]] == [0, 0]
