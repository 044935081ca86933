# SPDX-License-Identifier: Apache-2.0
"""Files for users are written whole or not at all."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` when the block has ended.

    If the block or the disk fails, what was at `path` stays, and nothing else is left.

    Raises:
        OSError: it cannot be written; `filename` is `path`.
    """
    # A link stays a link, and the file that it leads to is replaced.
    target = Path(os.path.realpath(path))
    if target.exists() and not (target.is_file() or target.is_dir()):
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    fresh = target.with_name(f".{uuid.uuid4().hex}")
    try:
        with fresh.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            os.chmod(fresh, target.stat().st_mode & 0o777)
        os.replace(fresh, target)
    except BaseException as error:
        with suppress(OSError):
            os.unlink(fresh)
        if isinstance(error, OSError) and error.filename in (None, str(fresh)):
            raise type(error)(error.errno, error.strerror, str(path)) from None
        raise
