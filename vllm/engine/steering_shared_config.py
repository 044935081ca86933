# SPDX-License-Identifier: Apache-2.0
"""How the API server processes of one engine share the configuration of its modules.

As soon as a change has been answered, a request may reach any of them. So each process
checks one small file, in a private directory, when a request asks for steering. If
something has removed the file, a server that asks the engine for its modules writes it
again; the metrics do so every few seconds. A single API server has no such file.
"""

from __future__ import annotations

import fcntl
import json
import os
from contextlib import suppress
from typing import TYPE_CHECKING

from vllm.config.steering_environment import DIRECTORY_ENV
from vllm.config.steering_json import Json
from vllm.config.steering_private_directory import (
    open_private,
    read_private,
    write_private,
)

if TYPE_CHECKING:
    from vllm.config import ParallelConfig

FILE = "config.json"


class SharedConfig:
    """The file.

    Args:
        directory: where it is; made again when it is missing.
    """

    def __init__(self, directory: str):
        self.directory = directory
        self._seen: tuple[int, int] | None = None

    def read_if_changed(self) -> Json | None:
        """The configuration in the file; None if there is none or it is as before."""
        path = os.path.join(self.directory, FILE)
        try:
            found = os.stat(path, follow_symlinks=False)
            seen = (found.st_ino, found.st_mtime_ns)
            if seen == self._seen:
                return None
            folder = open_private(self.directory)
        except OSError:
            # Missing, or not ours. The engine's next answer holds everything again.
            return None
        try:
            text = read_private(folder, FILE)
        finally:
            os.close(folder)
        if text is None:
            return None  # for example too many open files: it is read the next time
        self._seen = seen
        return json.loads(text)

    def keep(self, resolved: Json) -> None:
        """Write the configuration unless the file holds it or a newer one.

        Raises:
            OSError: it cannot be written, for example because the disk is full.
        """
        if not resolved["version"]:
            return  # as at start-up
        with suppress(FileExistsError):
            os.mkdir(self.directory, 0o700)
        folder = open_private(self.directory)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            current = read_private(folder, FILE)
            if current is None or json.loads(current)["version"] < resolved["version"]:
                write_private(folder, FILE, json.dumps(resolved))
        finally:
            os.close(folder)


_OPENED: dict[str, SharedConfig] = {}


def shared_config(parallel_config: ParallelConfig) -> SharedConfig | None:
    """The file that this process shares with other API servers; None if it is the only
    one.

    Engine cores and workers get None too, because they do not follow a front end.
    """
    directory = os.environ.get(DIRECTORY_ENV)
    if not (is_one_of_several(parallel_config) and directory):
        return None
    return _OPENED.setdefault(directory, SharedConfig(directory))


def is_one_of_several(parallel_config: ParallelConfig) -> bool:
    """Whether this process is one of several API servers that another one started."""
    several = parallel_config._api_process_count > 1
    return several and parallel_config._api_process_rank >= 0
