# SPDX-License-Identifier: Apache-2.0
"""pytest in processes of their own, for what this process cannot import or undo."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


def run_pytest(
    folder: Path, arguments: Mapping[str, Sequence[str]], env: Mapping[str, str]
) -> dict[str, str]:
    """Run pytest once for each name, at the same time; return what each has printed.

    Args:
        folder: gets a file NAME.log with the output, and the tests' temporary folders.
        arguments: of each run, by its name.
        env: variables that differ from those of this process.

    Raises:
        AssertionError: a run failed. The message is all that it has printed.
        BaseException: the wait ended, by a time limit for example. The error's notes
            say how far the runs were, and they have ended too.
    """
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rfE"]
    # A process that crashes in compiled code says where.
    everything = {**os.environ, "PYTHONFAULTHANDLER": "1", **env}
    runs: dict[str, subprocess.Popen[bytes]] = {}

    def printed(name: str) -> str:
        return (folder / f"{name}.log").read_text(errors="replace")

    try:
        for name, own in arguments.items():
            with (folder / f"{name}.log").open("wb") as log:
                runs[name] = subprocess.Popen(
                    [*command, f"--basetemp={folder / name}", *own],
                    env=everything,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
        codes = {name: run.wait() for name, run in runs.items()}
    except BaseException as error:
        for name, run in runs.items():
            run.kill()
            error.add_note(f"== {name}: exit status {run.wait()}\n{printed(name)}")
        raise
    failed = [name for name, code in codes.items() if code != 0]
    assert not failed, "\n".join(
        f"== {name}: exit status {codes[name]}\n{printed(name)}" for name in failed
    )
    return {name: printed(name) for name in runs}
