# SPDX-License-Identifier: Apache-2.0
"""Answers 400 to a JSON body with half of a surrogate pair, such as "\\ud800".

Python reads such text. Then vLLM answers 400 without the name of the field, or 500, or
cuts a stream, when the text gets to a tokenizer, an engine or an answer.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm.config.unicode_text import holds_halves, refuse_halves
from vllm.entrypoints.openai.steering.errors import error_response
from vllm.entrypoints.openai.steering.exchange import Exchange
from vllm.entrypoints.openai.steering.request_checks import LARGE_BODY
from vllm.exceptions import VLLMValidationError


class UnicodeBodies:
    """ASGI middleware: answers 400 to a JSON body that is no Unicode.

    Args:
        app: what answers other requests.
        is_on: False: such a body is vLLM's to answer.
    """

    def __init__(self, app: ASGIApp, is_on: Callable[[], bool]):
        self.app = app
        self.is_on = is_on

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self.is_on() and _is_json(scope):
            await Exchange(_Body().check, receive, send).run(self.app, scope)
        else:
            await self.app(scope, receive, send)


class _Body:
    """The parts of a body that have arrived."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    async def check(self, message: Message) -> JSONResponse | None:
        """The refusal of the body, if this is its end."""
        self._parts.append(message.get("body", b""))
        if message["type"] != "http.request" or message.get("more_body"):
            return None
        data = b"".join(self._parts)
        self._parts = []
        if len(data) <= LARGE_BODY:
            return _refusal(data)
        return await asyncio.to_thread(_refusal, data)


def _refusal(data: bytes) -> JSONResponse | None:
    try:
        if holds_halves(data):
            refuse_halves(json.loads(data))
    except VLLMValidationError as error:
        message, field = str(error), error.parameter
        return error_response(400, "BadRequestError", message, field)
    except (ValueError, RecursionError):
        pass  # no JSON, which the route says
    return None


def _is_json(scope: Scope) -> bool:
    """Whether the request's head lets its body be read as JSON."""
    kind = Headers(scope=scope).get("content-type", "").partition(";")[0]
    return not kind or kind.strip().lower().endswith(("/json", "+json"))
