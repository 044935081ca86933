# SPDX-License-Identifier: Apache-2.0
"""The engine core's answers to calls that list or change modules.

`collective_rpc(METHOD, args=(action, payload))` reaches the engine core through every
client of an engine. It answers with a `ModuleReply`, which says what happened. The
routes make HTTP statuses of it, and the Python functions exceptions.
"""

from __future__ import annotations

from enum import Enum

import msgspec

from vllm.config.steering_checks import about
from vllm.config.steering_json import Json

METHOD = "steering_modules"
# In a payload, the version of the configuration that the caller has. The reply has no
# configuration if the engine's is the same: with many presets it takes megabytes.
KNOWN_VERSION = "known_version"


class Outcome(str, Enum):
    """How a call ended."""

    DONE = "done"
    # Requests still use the module: ask again.
    DRAINING = "draining"
    # Its files are being read: ask again.
    LOADING = "loading"
    # The call, a file or an option is not valid.
    INVALID = "invalid"
    # There is no such module.
    UNKNOWN = "unknown"
    # The name is taken, requests are in the way, no slot fits, or another change runs.
    CONFLICT = "conflict"
    # The server is shutting down.
    STOPPING = "stopping"
    # A rank failed for another reason.
    FAILED = "failed"


# The caller asks again.
UNFINISHED = (Outcome.DRAINING, Outcome.LOADING)


class ModuleReply(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The answer of one rank, or of all of them together.

    Attributes:
        outcome: what happened; everything but `DONE`, `DRAINING` and `LOADING`
            is a refusal.
        error: one line, for a refusal.
        field: the field of the call that is wrong, or None.
        in_use: the number of requests in the way, or None.
        module: `ModuleInfo.to_json` of the module in question.
        listing: `modules` and `free_slots`, for `list`.
        stats: rows, tokens and bytes, for `stats`.
        config: `SteeringConfig.to_json` that the engine admits requests under now; None
            without steering, or where the caller has it.
    """

    outcome: Outcome
    error: str = ""
    field: str | None = None
    in_use: int | None = None
    module: Json | None = None
    listing: Json | None = None
    stats: Json | None = None
    config: Json | None = None

    @property
    def refused(self) -> bool:
        """Whether nothing was done."""
        return self.outcome not in (Outcome.DONE, *UNFINISHED)


def as_reply(answer: object) -> ModuleReply:
    """The reply as a struct. Clients in another process receive a dict."""
    return msgspec.convert(answer, ModuleReply)


class RefusedCall(Exception):
    """A call that the engine refuses; `reply` says why."""

    def __init__(
        self,
        outcome: Outcome,
        error: str,
        field: str | None = None,
        in_use: int | None = None,
    ):
        super().__init__(error)
        self.reply = ModuleReply(
            outcome=outcome, error=about(field, error), field=field, in_use=in_use
        )
