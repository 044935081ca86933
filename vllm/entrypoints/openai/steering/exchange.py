# SPDX-License-Identifier: Apache-2.0
"""A request whose body is looked at as it arrives, and may be refused for it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Looks at a part of the body; its answer, if that is refused.
Check = Callable[[Message], Awaitable[JSONResponse | None]]


class BodyRefused(Exception):
    """Ends the reading of a body."""


class Exchange:
    """One request: looks at its body, and drops the answer if that is refused."""

    def __init__(self, check: Check, receive: Receive, send: Send):
        self.refusal: JSONResponse | None = None
        self._has_answered = False
        self._check = check
        self._receive = receive
        self._send = send

    async def run(self, app: ASGIApp, scope: Scope) -> None:
        """Have `app` answer, unless the body is refused before it does."""
        try:
            await app(scope, self.receive, self.send)
        except Exception:
            if self.refusal is None:
                raise
        if self.refusal is not None:
            await self.refusal(scope, self._receive, self._send)

    async def receive(self) -> Message:
        """A part of the body.

        Raises:
            BodyRefused: nothing was answered yet, and the body is refused.
        """
        message = await self._receive()
        if self.refusal is None and not self._has_answered:
            self.refusal = await self._check(message)
        if self.refusal is not None:
            raise BodyRefused
        return message

    async def send(self, message: Message) -> None:
        if self.refusal is None:
            self._has_answered = True
            await self._send(message)
