# SPDX-License-Identifier: Apache-2.0
"""What launches need and steps share: made once, since making it costs the host more
than a launch. The tensors of slots and of the workspace keep their addresses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")
MOST = 256  # e.g. of steps of different lengths; then all of it is made anew


class Kept(Generic[K, V]):
    """A cache of at most `MOST` entries. Keys compare by identity, or are numbers."""

    def __init__(self) -> None:
        self._found: dict[K, V] = {}

    def __len__(self) -> int:
        return len(self._found)

    def get(self, key: K, make: Callable[[], V]) -> V:
        """What `make` has returned for this key."""
        found = self._found.get(key)
        if found is None:
            if len(self._found) >= MOST:
                self._found.clear()
            found = self._found[key] = make()
        return found
