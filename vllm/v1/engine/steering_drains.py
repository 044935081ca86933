# SPDX-License-Identifier: Apache-2.0
"""Who waits for the last requests of which module."""

from __future__ import annotations


class Drains:
    """The callers that drain each module: it stays closed until the last one leaves.

    Callers that do not say who they are count as one.
    """

    def __init__(self) -> None:
        self._callers: dict[str, set[str]] = {}

    def join(self, name: str, caller: str) -> None:
        """Count a caller that waits; one that asks again is counted once."""
        self._callers.setdefault(name, set()).add(caller)

    def leave(self, name: str, caller: str) -> bool:
        """Forget a caller; whether nobody else drains the module."""
        left = self._callers.get(name, set()) - {caller}
        if left:
            self._callers[name] = left
        else:
            self.end(name)
        return not left

    def end(self, name: str) -> None:
        """Forget all callers: the module has changed."""
        self._callers.pop(name, None)
