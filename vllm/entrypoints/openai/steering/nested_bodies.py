# SPDX-License-Identifier: Apache-2.0
"""Answers 400 to a body whose JSON is nested deeper than Python can read.

Python's parser raises `RecursionError` there. vLLM answers 500 on routes that parse the
body themselves, and on the others does not say what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from vllm.config.steering_checks import shown
from vllm.entrypoints.openai.steering.errors import error_response
from vllm.logger import init_logger

logger = init_logger(__name__)

NESTED = (
    "body: found JSON that is nested too deep, expected at most a few hundred levels"
)


def refuse_nested_bodies(app: FastAPI, is_on: Callable[[], bool]) -> None:
    """Add handlers of this error, after those of vLLM.

    Args:
        app: the server.
        is_on: False: the error is vLLM's to answer.
    """
    stock = app.exception_handlers[HTTPException]

    async def of_route(request: Request, error: Exception) -> Response:
        if not is_on():
            raise error
        return _refusal(request)

    async def of_fastapi(request: Request, error: Exception) -> Response:
        if is_on() and isinstance(error.__cause__, RecursionError):
            return _refusal(request)
        return await stock(request, error)

    app.add_exception_handler(RecursionError, of_route)
    app.add_exception_handler(HTTPException, of_fastapi)


def _refusal(request: Request) -> JSONResponse:
    """Answers 400. The log has a line, in case the server is at fault."""
    logger.warning("Steering: RecursionError in %s: 400", shown(request.url.path))
    return error_response(400, "BadRequestError", NESTED, "body")
