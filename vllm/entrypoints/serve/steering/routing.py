# SPDX-License-Identifier: Apache-2.0
"""What the routes share: reading requests, and answering with a refusal."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect

from vllm.entrypoints.openai.steering.errors import error_response
from vllm.entrypoints.serve.steering.access import RequestRefused, check_key
from vllm.entrypoints.serve.steering.protocol import MAX_BODY_BYTES
from vllm.entrypoints.serve.steering.service import SteeringModulesService

T = TypeVar("T")


class RefusingRoute(APIRoute):
    """A route whose handler may raise `RequestRefused`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[None, None, Response]]:
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                return await handle(request)
            except RequestRefused as error:
                return refused(error)

        return answer


def steering_router() -> APIRouter:
    """A router for routes that may refuse."""
    return APIRouter(tags=["steering"], route_class=RefusingRoute)


def modules_of(request: Request) -> SteeringModulesService:
    return request.app.state.steering_modules


def modules_to_change(request: Request) -> SteeringModulesService:
    check_key(request.headers, request.app.state.steering_api_key)
    return modules_of(request)


async def read_body(request: Request) -> bytes:
    """The request's body, read no further than its limit."""
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                raise RequestRefused(
                    413, f"body: found more than {MAX_BODY_BYTES} bytes, expected fewer"
                )
    except ClientDisconnect:
        raise RequestRefused(408, "the caller disconnected") from None
    return bytes(body)


async def while_connected(request: Request, work: Coroutine[None, None, T]) -> T:
    """The result of some work, which is cancelled if the caller goes away.

    Args:
        request: its body has been read.
        work: what the caller waits for.

    Raises:
        RequestRefused: 408, the caller has gone away.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(caller_left(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise RequestRefused(408, "the caller disconnected")
    finally:
        leaving.cancel()
        working.cancel()


async def caller_left(request: Request) -> None:
    """Return when the caller has gone away. What it still sends is dropped."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def refused(error: RequestRefused) -> JSONResponse:
    """The answer to a request that a route refuses."""
    more = {} if error.in_use is None else {"in_use": error.in_use}
    headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else None
    return error_response(
        error.status,
        "SteeringModuleError",
        error.message,
        error.field,
        headers,
        **more,
    )
