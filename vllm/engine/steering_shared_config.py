# SPDX-License-Identifier: Apache-2.0
"""How the API server processes of one engine share the configuration of its modules.

A request may reach any of them as soon as a change has been answered, so each looks at
one small file when a request asks for steering. The process that starts the servers
makes a directory that only its user may enter, and passes its path in the environment.
A server that asks the engine for its modules, as the metrics do every few seconds,
writes the file again if something has removed it. A single API server has no file.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import stat
import tempfile
import uuid
from contextlib import suppress
from multiprocessing.util import Finalize
from typing import TYPE_CHECKING

from vllm.config.steering_replies import Json

if TYPE_CHECKING:
    from vllm.config import ParallelConfig

# Internal: from the process that starts several API servers to these.
SHARED_ENV = "VLLM_STEERING_SHARED_CONFIG"
FILE = "config.json"


class SharedConfig:
    """The file, in a private directory.

    Args:
        directory: its path; made again when it is missing.
    """

    def __init__(self, directory: str):
        self.directory = directory
        self._seen: tuple[int, int] | None = None

    def read_if_changed(self) -> Json | None:
        """The configuration in the file, or None: no file, or none since last time."""
        path = os.path.join(self.directory, FILE)
        try:
            found = os.stat(path, follow_symlinks=False)
            seen = (found.st_ino, found.st_mtime_ns)
            if seen == self._seen:
                return None
            folder = _open_private(self.directory)
        except OSError:
            # Not there, or not ours: the engine's next answer says it all again.
            return None
        try:
            resolved = _read(folder)
        finally:
            os.close(folder)
        self._seen = seen
        return resolved

    def keep(self, resolved: Json) -> None:
        """Write the configuration unless the file has it, or a newer one."""
        if not resolved["version"]:
            return  # as at start-up
        with suppress(FileExistsError):
            os.mkdir(self.directory, 0o700)
        folder = _open_private(self.directory)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            current = _read(folder)
            if current is None or current["version"] < resolved["version"]:
                _write(folder, resolved)
        finally:
            os.close(folder)


def _open_private(directory: str) -> int:
    """A descriptor of a directory.

    Raises:
        PermissionError: others may enter it, or it is somebody else's.
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


def _read(folder: int) -> Json | None:
    try:
        descriptor = os.open(FILE, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder)
    except OSError:
        return None  # not there, or a link, which is not followed
    with open(descriptor, encoding="utf-8") as file:
        return json.load(file)


def _write(folder: int, resolved: Json) -> None:
    """Replace the file at once, so that no reader sees half of it."""
    fresh = f"{FILE}.{uuid.uuid4().hex}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    descriptor = os.open(fresh, flags, 0o600, dir_fd=folder)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            json.dump(resolved, file)
        os.replace(fresh, FILE, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(fresh, dir_fd=folder)
        raise


_OPENED: dict[str, SharedConfig] = {}


def shared_config(parallel_config: ParallelConfig) -> SharedConfig | None:
    """What this process shares with other API servers; None: it is the only one.

    Engine cores and workers get None too: they do not follow, they decide.
    """
    one_of_several = (
        parallel_config._api_process_count > 1
        and parallel_config._api_process_rank >= 0
    )
    directory = os.environ.get(SHARED_ENV)
    if not (one_of_several and directory):
        return None
    return _OPENED.setdefault(directory, SharedConfig(directory))


def prepare_sharing(parallel_config: ParallelConfig) -> None:
    """In the process that starts several API servers: make their directory."""
    starts_several = (
        parallel_config._api_process_count > 1 and parallel_config._api_process_rank < 0
    )
    if not starts_several:
        return
    directory = tempfile.mkdtemp(prefix="vllm-steering-")
    os.environ[SHARED_ENV] = directory
    # This process outlives the servers.
    Finalize(None, shutil.rmtree, (directory, True), exitpriority=1)
