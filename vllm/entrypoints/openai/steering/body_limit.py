# SPDX-License-Identifier: Apache-2.0
"""Limits the body of a request, which vLLM reads and parses whole on its event loop.

The routes under `/v1/steering` have a smaller limit of their own.
"""

from __future__ import annotations

from collections.abc import Callable

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm.entrypoints.openai.steering.errors import error_response

OPTION = "additional_config.steering.max_body_mib"
# A length of so many digits is above any limit.
MAX_DIGITS = 20


class BodyTooLarge(Exception):
    """Ends the reading of a body."""


class BodyLimit:
    """ASGI middleware: answers 413 to a request whose body is too large.

    Args:
        app: what answers other requests.
        most: the limit in bytes; None: no limit.
    """

    def __init__(self, app: ASGIApp, most: Callable[[], int | None]):
        self.app = app
        self.most = most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        most = self.most() if scope["type"] == "http" else None
        if most is None:
            await self.app(scope, receive, send)
            return
        announced = _content_length(scope)
        if announced is not None and announced > most:
            refused = _refusal(f"{announced} bytes", most)
            await refused(scope, receive, send)
            return
        exchange = _Exchange(most, receive, send)
        try:
            await self.app(scope, exchange.receive, exchange.send)
        except Exception:
            if not exchange.is_refused:
                raise
        if exchange.is_refused:
            refused = _refusal(f"more than {most} bytes", most)
            await refused(scope, receive, send)


class _Exchange:
    """One request: counts its body, and drops the answer if that is too large."""

    def __init__(self, most: int, receive: Receive, send: Send):
        self.most = most
        self.received = 0
        self.has_answered = False
        self._receive = receive
        self._send = send

    @property
    def is_refused(self) -> bool:
        """Whether the body is too large, and nothing was answered before."""
        return self.received > self.most and not self.has_answered

    async def receive(self) -> Message:
        message = await self._receive()
        self.received += len(message.get("body", b""))
        if self.is_refused:
            raise BodyTooLarge
        return message

    async def send(self, message: Message) -> None:
        if not self.is_refused:
            self.has_answered = True
            await self._send(message)


def _refusal(found: str, most: int) -> JSONResponse:
    message = f"body: found {found}, expected at most {most} ({OPTION})"
    return error_response(413, "RequestEntityTooLargeError", message, "body")


def _content_length(scope: Scope) -> int | None:
    """The length that the request's head announces."""
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            # Python reads at most 4300 digits, and a parser may let zeros through.
            return int(value.lstrip(b"0")[:MAX_DIGITS] or b"0")
    return None
