# SPDX-License-Identifier: Apache-2.0
"""A directory in which the processes of one engine exchange small files.

Only their user may enter it. The process that starts the others makes it and passes
its path in the environment.
"""

from __future__ import annotations

import functools
import os
import shutil
import stat
import tempfile
import uuid
from contextlib import suppress
from multiprocessing.util import Finalize

from vllm.config.steering_checks import SteeringConfigError, one_line
from vllm.config.steering_environment import DIRECTORY_ENV

FAILURE = "failure.txt"


@functools.cache
def make_private_directory() -> str:
    """Make the directory for the processes that this one starts, once.

    One that is inherited belongs to another engine.
    """
    directory = tempfile.mkdtemp(prefix="vllm-steering-")
    os.environ[DIRECTORY_ENV] = directory
    # This process lives longer than those that it starts.
    Finalize(None, shutil.rmtree, (directory, True), exitpriority=1)
    return directory


def open_private(directory: str) -> int:
    """Open the directory; returns its descriptor.

    Raises:
        PermissionError: others may enter it, or it is somebody else's.
        OSError: it does not exist, or is a link.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
    folder = os.open(directory, flags)
    found = os.fstat(folder)
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        os.close(folder)
        raise PermissionError(
            f"{directory}: expected a directory that only this user may enter"
        )
    return folder


def read_private(folder: int, name: str) -> str | None:
    """The text of a file in the directory; None if it does not exist or is a link."""
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder)
    except OSError:
        return None
    with open(descriptor, encoding="utf-8") as file:
        return file.read()


def write_private(folder: int, name: str, text: str) -> None:
    """Replace a file in one step, so that no reader sees half of it."""
    fresh = f"{name}.{uuid.uuid4().hex}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    descriptor = os.open(fresh, flags, 0o600, dir_fd=folder)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(fresh, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(fresh, dir_fd=folder)
        raise


def start_up_failure(error: ValueError) -> SteeringConfigError:
    """The error in one line, also written to a file for the process that started this
    one.

    Raise what it returns `from None`.
    """
    text = one_line(error)
    with suppress(OSError):
        folder = open_private(os.environ.get(DIRECTORY_ENV, ""))
        try:
            write_private(folder, FAILURE, text)
        finally:
            os.close(folder)
    return SteeringConfigError(text)


def take_start_up_failure() -> SteeringConfigError | None:
    """Take the error that an engine core or a worker has written, or None."""
    with suppress(OSError):
        folder = open_private(os.environ.get(DIRECTORY_ENV, ""))
        try:
            text = read_private(folder, FAILURE)
            if text is not None:
                os.unlink(FAILURE, dir_fd=folder)
                return SteeringConfigError(text)
        finally:
            os.close(folder)
    return None
