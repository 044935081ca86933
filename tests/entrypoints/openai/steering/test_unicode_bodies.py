# SPDX-License-Identifier: Apache-2.0
"""JSON with half of a surrogate pair is a 400 that names the field, on any route."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any

import pytest
from fastapi import Body, FastAPI, Request
from fastapi.testclient import TestClient

from vllm.entrypoints.openai.steering.body_limit import BodyLimit
from vllm.entrypoints.openai.steering.unicode_bodies import UnicodeBodies

HALF = {"prompt": ["a", "b \ud83d"]}
PAIR = {"prompt": ["a", "b \U0001f600 \\ud83d"]}
JSON = {"Content-Type": "application/json"}
LARGE = 100_000
MOST = 3 * LARGE


@pytest.fixture
def is_on() -> list[bool]:
    """Whether the server steers, which a test may change."""
    return [True]


@pytest.fixture
def http(is_on: list[bool]) -> Iterator[TestClient]:
    app = FastAPI()

    @app.post("/typed")
    async def typed(body: Annotated[Any, Body()]) -> str:
        return ascii(body)

    @app.post("/own")
    async def own(request: Request) -> str:
        try:
            return ascii(await request.json())
        except Exception:  # as some of vLLM's routes do
            return "failed"

    app.add_middleware(UnicodeBodies, is_on=lambda: is_on[0])
    app.add_middleware(BodyLimit, most=lambda: MOST)
    with TestClient(app, headers=JSON) as client:
        yield client


@pytest.mark.parametrize("route", ["/typed", "/own"])
@pytest.mark.parametrize("extra", [0, LARGE])
@pytest.mark.parametrize("kind", ["application/json", "application/x+json", None])
def test_a_half_is_refused_by_the_path_of_its_field(
    http: TestClient, route: str, extra: int, kind: str | None
) -> None:
    body = json.dumps({"pad": "x" * extra, **HALF})
    del http.headers["Content-Type"]
    headers = {} if kind is None else {"Content-Type": kind}
    answer = http.post(route, content=body, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"] == {
        "message": "prompt[1]: found 'b \\ud83d', which has half of a surrogate pair, "
        "expected Unicode text",
        "type": "BadRequestError",
        "param": "prompt[1]",
        "code": 400,
    }


@pytest.mark.parametrize("cut", [1, 3, 7])
def test_parts_of_a_body_are_looked_at_together(http: TestClient, cut: int) -> None:
    for value, status in ((HALF, 400), (PAIR, 200)):
        data = json.dumps(value).encode()
        parts = (data[at : at + cut] for at in range(0, len(data), cut))
        answer = http.post("/typed", content=parts)
        assert answer.status_code == status, answer.text
    assert answer.json() == ascii(PAIR)


def test_other_bodies_reach_their_route(http: TestClient, is_on: list[bool]) -> None:
    assert http.post("/own", json=PAIR).json() == ascii(PAIR)
    assert http.post("/own", content=b'["\\ud800').json() == "failed"
    assert http.post("/own", content=b"[" * 50_000).json() == "failed"
    assert http.post("/typed", content=b'["\\ud800').status_code == 422
    text = {"Content-Type": "text/plain"}
    half = json.dumps(HALF)
    assert http.post("/own", content=half, headers=text).json() == ascii(HALF)
    is_on[0] = False
    assert http.post("/typed", content=half).json() == ascii(HALF)


def test_a_body_that_is_too_large_is_not_looked_at(http: TestClient) -> None:
    body = json.dumps({"pad": "x" * MOST, **HALF}).encode()
    assert http.post("/own", content=body).status_code == 413
    assert http.post("/own", content=iter([body[:5], body[5:]])).status_code == 413
