# SPDX-License-Identifier: Apache-2.0
"""Limits the body of a request, which vLLM reads and parses whole on its event loop.

The routes under `/v1/steering` have a smaller limit of their own.
"""

from __future__ import annotations

from collections.abc import Callable

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm.entrypoints.openai.steering.errors import error_response
from vllm.entrypoints.openai.steering.exchange import Exchange

OPTION = "additional_config.steering.max_body_mib"
# A length of so many digits is above any limit.
MAX_DIGITS = 20


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
        received = 0

        async def check(message: Message) -> JSONResponse | None:
            nonlocal received
            received += len(message.get("body", b""))
            return (
                _refusal(f"more than {most} bytes", most) if received > most else None
            )

        await Exchange(check, receive, send).run(self.app, scope)


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
