# SPDX-License-Identifier: Apache-2.0
"""How the engine core refuses one steered request and gives the reason.

A front end checks each request before. The core refuses a request only if its module
has changed since: it is being removed or replaced, or is gone. The reason travels as
the `stop_reason` of an output whose `finish_reason` is `error`.
"""

from __future__ import annotations

import json

from vllm.config.steering_checks import ModuleChangedError
from vllm.exceptions import VLLMValidationError

PREFIX = "steering: "


def stop_reason_of(error: VLLMValidationError) -> str:
    """The refusal as a `stop_reason`."""
    return PREFIX + json.dumps([str(error.args[0]), error.parameter])


def refusal_in(stop_reason: int | str | None) -> ModuleChangedError | None:
    """The refusal that `stop_reason_of` wrote, or None for another stop reason."""
    if not isinstance(stop_reason, str) or not stop_reason.startswith(PREFIX):
        return None
    message, parameter = json.loads(stop_reason.removeprefix(PREFIX))
    return ModuleChangedError(message, parameter)
