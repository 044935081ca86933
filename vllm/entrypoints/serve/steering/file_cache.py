# SPDX-License-Identifier: Apache-2.0
"""Files beside modules, read when a client asks and kept until they change."""

from __future__ import annotations

import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")

MAX_FILES = 16


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
            if len(self._known) > MAX_FILES:
                del self._known[next(iter(self._known))]
        if isinstance(known[1], Exception):
            raise known[1]
        return known[1]

    def _content(self, path: Path) -> T | Exception:
        try:
            return self._read(path)
        except ValueError as error:
            return error.with_traceback(None)
