# SPDX-License-Identifier: Apache-2.0
"""A small cache, by bytes, that drops the least recently used entry first."""

from __future__ import annotations

import threading
from collections import OrderedDict

# Longest key in bytes; most entries; most bytes of all keys. The largest request that
# is accepted (1023 sites with four conditional clamps each) has a key of 313 KiB. What
# is kept takes about three times the bytes of its key.
MAX_KEY_BYTES = 512 << 10
MAX_KEPT = 256
MAX_KEPT_BYTES = 4 << 20


class KeptParses:
    """Parsed requests by the bytes of what was asked; safe between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[bytes, object] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: bytes | None) -> object | None:
        """What is kept under the key, or None."""
        if key is None:
            return None
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
            return found

    def keep(self, key: bytes | None, made: object) -> None:
        """Keep a request, unless its key is None or too long."""
        if key is None or len(key) > MAX_KEY_BYTES:
            return
        with self._lock:
            if key not in self._kept:
                self._bytes += len(key)
            self._kept[key] = made
            while len(self._kept) > MAX_KEPT or self._bytes > MAX_KEPT_BYTES:
                oldest, _ = self._kept.popitem(last=False)
                self._bytes -= len(oldest)
