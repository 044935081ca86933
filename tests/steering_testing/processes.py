# SPDX-License-Identifier: Apache-2.0
"""The processes that a server has started."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass


@dataclass(frozen=True)
class Process:
    """A running process; `name` is its command line, or the title that it has set."""

    pid: int
    name: str


def descendants(pid: int) -> list[Process]:
    """Every process that another one has started, and those that these started."""
    listed = subprocess.run(
        ["ps", "-e", "-o", "pid=,ppid=,args="],
        capture_output=True,
        text=True,
        check=True,
    )
    rows = [line.split(None, 2) for line in listed.stdout.splitlines()]
    found: list[Process] = []
    parents = [pid]
    while parents:
        parent = str(parents.pop())
        for own, started_by, name in (row for row in rows if len(row) == 3):
            if started_by == parent:
                found.append(Process(int(own), name))
                parents.append(int(own))
    return found
