# SPDX-License-Identifier: Apache-2.0
"""Files beside modules, read when a client asks and kept until they change."""

from __future__ import annotations

import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")

# Of the files that are kept. A server may have a module for each layer; if it kept the
# files of some of them only, a client could make it read all of them again and again.
MAX_BYTES = 512 << 20


class FileCache(Generic[T]):
    """What some files contain.

    One file is read at a time, once for all who ask. A file with bad content is kept as
    its error, so a client cannot make the server read it again and again. An error of
    the system, such as too many open files, is not kept: it may be over the next time.

    Args:
        read: reads one file; raises `OSError` or `ValueError`.
    """

    def __init__(self, read: Callable[[Path], T]):
        self._read = read
        self._lock = threading.Lock()
        self._known: dict[Path, tuple[tuple[int, int], T | Exception]] = {}

    def get(self, path: Path) -> T | None:
        """The content of a file, or None if there is no file.

        Raises:
            OSError: as `read`.
            ValueError: as `read`, or it is no regular file. A pipe, for example, would
                be waited for.
        """
        with self._lock:
            try:
                found = path.stat()
            except (OSError, ValueError):
                self._known.pop(path, None)
                return None
            if not stat.S_ISREG(found.st_mode):
                raise ValueError(f"{path}: found no regular file, expected one")
            changed = found.st_mtime_ns, found.st_size
            known = self._known.pop(path, None)
            if known is None or known[0] != changed:
                known = changed, self._content(path)
            # The file that was asked for last is the last one.
            self._known[path] = known
            self._forget()
        if isinstance(known[1], Exception):
            raise known[1]
        return known[1]

    def _forget(self) -> None:
        """Drop the files that were asked for first, if all are too large together."""
        size = sum(changed[1] for changed, _ in self._known.values())
        while size > MAX_BYTES and len(self._known) > 1:
            (_, dropped), _ = self._known.pop(next(iter(self._known)))
            size -= dropped

    def _content(self, path: Path) -> T | Exception:
        try:
            return self._read(path)
        except ValueError as error:
            return error.with_traceback(None)
