# SPDX-License-Identifier: Apache-2.0
"""Bodies that are too large are refused before anything parses them."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from fastapi import Body, FastAPI
from fastapi.testclient import TestClient
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

import vllm.plugins.steering as plugin
from vllm.entrypoints.openai.steering.body_limit import BodyLimit

MOST = 1000
SLACK = len(b'""')


@pytest.fixture
def limits() -> list[int | None]:
    """The limit that is in force, which a test may change."""
    return [MOST]


@pytest.fixture
def http(limits: list[int | None]) -> Iterator[TestClient]:
    app = FastAPI()

    @app.post("/echo")
    async def echo(text: str = Body()) -> int:
        return len(text)

    app.add_middleware(BodyLimit, most=lambda: limits[0])
    with TestClient(app) as client:
        yield client


def chunked(text: str) -> Iterator[bytes]:
    """The text as JSON, without an announced length."""
    data = f'"{text}"'.encode()
    yield from (data[at : at + 100] for at in range(0, len(data), 100))


def test_a_body_of_the_largest_size_is_read(http: TestClient) -> None:
    text = "a" * (MOST - SLACK)
    assert http.post("/echo", json=text).json() == len(text)
    headers = {"Content-Type": "application/json"}
    answer = http.post("/echo", content=chunked(text), headers=headers)
    assert answer.json() == len(text)


def test_one_byte_more_is_refused_by_its_announced_length(http: TestClient) -> None:
    answer = http.post("/echo", json="a" * (MOST - SLACK + 1))
    assert answer.status_code == 413
    assert answer.json() == {
        "error": {
            "message": "body: found 1001 bytes, expected at most 1000 "
            "(additional_config.steering.max_body_mib)",
            "type": "RequestEntityTooLargeError",
            "param": "body",
            "code": 413,
        }
    }


@pytest.mark.parametrize(
    ("length", "status"),
    [("0" * 5000 + "2", 200), ("0" * 5000, 200), ("0999", 200), ("01001", 413)]
    + [("9" * digits, 413) for digits in (19, 25, 5000)],
)
def test_a_length_of_any_number_of_digits_is_understood(
    length: str, status: int
) -> None:
    """Servers pass on zeros in front; Python reads no more than 4300 digits."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await Response()(scope, receive, send)

    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b'""'}

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [(b"content-length", length.encode())]
    scope = {"type": "http", "method": "POST", "path": "/", "headers": headers}
    asyncio.run(BodyLimit(app, lambda: MOST)(scope, receive, send))
    assert sent[0]["status"] == status


def test_a_body_without_a_length_is_refused_when_it_gets_too_large(
    http: TestClient,
) -> None:
    headers = {"Content-Type": "application/json"}
    answer = http.post("/echo", content=chunked("a" * MOST), headers=headers)
    assert answer.status_code == 413
    assert "found more than 1000 bytes" in answer.json()["error"]["message"]


def test_reading_stops_at_the_limit() -> None:
    received, sent = [], []

    async def receive() -> dict:
        received.append(1)
        return {"type": "http.request", "body": b"a" * 400, "more_body": True}

    async def send(message: dict) -> None:
        sent.append(message["type"])

    async def app(scope: object, receive, send: object) -> None:
        while True:
            await receive()

    scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
    asyncio.run(BodyLimit(app, lambda: MOST)(scope, receive, send))
    assert (len(received), sent) == (3, ["http.response.start", "http.response.body"])


def test_without_a_limit_any_body_is_read(
    http: TestClient, limits: list[int | None]
) -> None:
    limits[0] = None
    assert http.post("/echo", json="a" * 5000).json() == 5000


def test_a_server_has_the_limit_of_its_engine_behind_its_key() -> None:
    plugin.install_front_end_seams()
    from vllm.entrypoints.launchers import app as launcher

    app = FastAPI()
    app.add_api_route("/v1/any", lambda: 1, methods=["POST"])
    everyone = {"allowed_origins": ["*"], "allowed_methods": ["*"]}
    args = Namespace(
        **everyone,
        allowed_headers=["*"],
        allow_credentials=False,
        api_key=["key"],
        enable_request_id_headers=False,
        middleware=[],
    )
    launcher.init_entrypoints_middleware(args, app, ())
    with TestClient(app) as client:

        def status(key: str = "key") -> int:
            headers = {"Authorization": f"Bearer {key}"}
            body = b"a" * (2 << 20)
            return client.post("/v1/any", content=body, headers=headers).status_code

        assert status() == 200  # no engine yet
        for additional, expected in (
            ({}, 200),
            ({"steering": {}}, 200),
            ({"steering": {"max_body_mib": 1}}, 413),
        ):
            app.state.vllm_config = SimpleNamespace(additional_config=additional)
            assert status() == expected
        assert status("another") == 401
