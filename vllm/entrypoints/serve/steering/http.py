# SPDX-License-Identifier: Apache-2.0
"""What the routes share: who may call, the body, and OpenAI's form of an error."""

from __future__ import annotations

from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse

from vllm.entrypoints.serve.steering.access import RequestRefused, check_key
from vllm.entrypoints.serve.steering.protocol import MAX_BODY_BYTES
from vllm.entrypoints.serve.steering.service import SteeringModulesService

PATH_PREFIX = "/v1/steering"


def service(request: Request, *, mutation: bool) -> SteeringModulesService:
    """The engine's modules and presets, for a caller who may.

    Raises:
        RequestRefused: the caller lacks the key.
    """
    state = request.app.state
    check_key(request.headers, state.steering_api_key, mutation=mutation)
    return state.steering_modules


async def body(request: Request) -> bytes:
    """The request's body, read no further than its limit."""
    read = bytearray()
    async for chunk in request.stream():
        read += chunk
        if len(read) > MAX_BODY_BYTES:
            raise RequestRefused(
                413, f"body: expected at most {MAX_BODY_BYTES} bytes, found more"
            )
    return bytes(read)


def refused(error: RequestRefused) -> JSONResponse:
    """OpenAI's form of an error."""
    content: dict[str, Any] = {
        "message": error.message,
        "type": "SteeringModuleError",
        "param": error.field,
        "code": error.status,
    }
    if error.in_use is not None:
        content["in_use"] = error.in_use
    headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else None
    return JSONResponse({"error": content}, error.status, headers)
