# SPDX-License-Identifier: Apache-2.0
"""Bodies that are nested deeper than Python reads are a 400 that says so."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator
from typing import Annotated, Any

import pytest
from fastapi import Body, FastAPI, HTTPException, Request
from fastapi.testclient import TestClient

from vllm.entrypoints.openai.steering.nested_bodies import (
    NESTED,
    refuse_nested_bodies,
)
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler

DEEP = b"[" * 200_000 + b"]" * 200_000


@pytest.fixture
def is_on() -> list[bool]:
    """Whether the server steers, which a test may change."""
    return [True]


@pytest.fixture
def http(is_on: list[bool]) -> Iterator[TestClient]:
    """A server with vLLM's handlers, and a route of either kind."""
    app = FastAPI()
    init_exception_handler(app)
    app.state.args = Namespace(log_error_stack=False)

    @app.post("/typed")
    async def typed(body: Annotated[Any, Body()]) -> str:
        return "read"

    @app.post("/own")
    async def own(request: Request) -> str:
        await request.json()
        return "read"

    @app.post("/stock")
    async def stock() -> None:
        raise HTTPException(409, "of the route")

    refuse_nested_bodies(app, lambda: is_on[0])
    headers = {"Content-Type": "application/json"}
    with TestClient(app, raise_server_exceptions=False, headers=headers) as client:
        yield client


@pytest.mark.parametrize("route", ["/typed", "/own"])
@pytest.mark.parametrize(
    "body",
    [DEEP, b'{"a": ' * 200_000, b'{"a": %s}' % DEEP],
    ids=["lists", "objects", "a field"],
)
def test_a_body_that_is_nested_too_deep_is_refused(
    http: TestClient, route: str, body: bytes
) -> None:
    answer = http.post(route, content=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["message"], error["param"], error["code"]) == (NESTED, "body", 400)
    assert http.post(route, content=b"[[[[1]]]]").json() == "read"


def test_other_errors_stay_as_they_are(http: TestClient) -> None:
    answer = http.post("/stock")
    assert answer.status_code == 409
    assert answer.json()["error"]["message"] == "of the route"
    assert http.post("/typed", content=b"[1,").status_code == 400
    assert http.post("/typed", content=b"[1,").json()["error"]["message"] != NESTED


def test_without_steering_vllm_answers(http: TestClient, is_on: list[bool]) -> None:
    is_on[0] = False
    assert http.post("/own", content=DEEP).status_code == 500
    answer = http.post("/typed", content=DEEP)
    assert answer.status_code == 400 and "nested" not in json.dumps(answer.json())
