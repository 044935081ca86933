# SPDX-License-Identifier: Apache-2.0
"""The module that an engine's workers are loading, one at a time.

Workers load beside the thread that steps them, and callers ask again until the module
is in host memory on every rank. Callers of other modules wait for their turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from vllm.config.steering import ModuleInfo
from vllm.config.steering_json import Json
from vllm.config.steering_module_options import MODULE_OPTIONS
from vllm.config.steering_replies import Outcome, RefusedCall
from vllm.engine.steering_options import ROOT

# A caller that does not ask for so long has gone away.
ABANDONED_S = 10.0


@dataclass
class Loading:
    """What is being loaded; `asked` is when a caller last asked for it."""

    module: ModuleInfo
    asked: float


class ModuleLoads:
    """Has every worker load a module, and says when all have.

    Args:
        workers: calls a verb of `ModuleChanges` on every rank; their replies.
    """

    def __init__(self, workers: Callable[..., list[Json]]):
        self.workers = workers
        self.current: Loading | None = None

    def ready(self, module: ModuleInfo) -> bool:
        """Whether the module is loaded everywhere; it is being loaded from now on.

        Raises:
            RefusedCall: a rank cannot load it. No rank then keeps any of it.
        """
        module, now = module.unplaced(), time.monotonic()
        if self.current is not None and self.current.module != module:
            if now - self.current.asked < ABANDONED_S:
                return False
            self.forget(self.current.module)
        if self.current is None:
            self.current = Loading(module, now)
            self._ask(module, "load", module.to_json(), module.name)
        self.current.asked = now
        replies = self._ask(module, "loaded")
        return all(reply["ready"] for reply in replies)

    def staged(self) -> None:
        """The workers have taken what was loaded, or have dropped it."""
        self.current = None

    def forget(self, module: ModuleInfo) -> None:
        """Give up loading the module, if it is being loaded."""
        if self.current is not None and self.current.module == module.unplaced():
            self.current = None
            self.workers("forget")

    def forget_name(self, name: object) -> None:
        """As `forget`, for a caller that knows the name only."""
        if self.current is not None and self.current.module.name == name:
            self.forget(self.current.module)

    def _ask(self, module: ModuleInfo, *call: object) -> list[Json]:
        replies = self.workers(*call)
        error = first_error(replies)
        if error is None:
            return replies
        self.forget(module)
        raise refusal(error)


def first_error(replies: list[Json]) -> Json | None:
    """The first reply of a rank that is not ok."""
    return next((reply for reply in replies if not reply["ok"]), None)


def refusal(error: Json) -> RefusedCall:
    """The refusal for a rank's error."""
    outcome = Outcome.INVALID if error.get("refused") else Outcome.FAILED
    return RefusedCall(outcome, f"{error['error']}; nothing was changed", "path")


def inspection_refusal(name: object, text: str) -> RefusedCall:
    """The refusal of a module that cannot be inspected.

    An option is named as the caller wrote it, and not by its path in the start-up
    configuration.
    """
    where = f"{ROOT}.modules.{name}"
    if text.startswith(f"{where}."):
        text = text.removeprefix(f"{where}.")
        return RefusedCall(Outcome.INVALID, text, text.partition(":")[0])
    if text.startswith(f"{where}: "):
        return RefusedCall(Outcome.INVALID, text.removeprefix(f"{where}: "))
    for option in MODULE_OPTIONS:
        # What the files say is held against the options only when they are read.
        _, marked, reason = text.partition(f"): {option}: ")
        if marked:
            return RefusedCall(Outcome.INVALID, f"{option}: {reason}", option)
    return RefusedCall(Outcome.INVALID, text, "path")
