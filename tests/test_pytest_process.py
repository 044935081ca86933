# SPDX-License-Identifier: Apache-2.0
"""What tests in processes of their own say when they fail or take too long."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from steering_testing.pytest_process import run_pytest

PASSES = """
def test_has_a_folder_of_its_own(tmp_path):
    print("folder", tmp_path)
"""
FAILS = """
import os

def test_says_why():
    print("the first line")
    assert os.environ["COLOUR"] == "red"
"""
HANGS = """
import time

def test_says_little(capfd):
    with capfd.disabled():
        print("it has begun", flush=True)
    time.sleep(600)
"""


def write(folder: Path, text: str) -> str:
    folder.mkdir()
    path = folder / "test_inner.py"
    path.write_text(text)
    return str(path)


def test_runs_have_folders_of_their_own_and_return_what_they_print(
    tmp_path: Path,
) -> None:
    inner = write(tmp_path / "tests", PASSES)
    printed = run_pytest(tmp_path, {"a": ["-s", inner], "b": ["-s", inner]}, {})
    for name, text in printed.items():
        assert "1 passed" in text
        assert f"folder {tmp_path / name}/" in text


def test_a_failure_shows_all_that_the_run_has_printed(tmp_path: Path) -> None:
    files = {
        name: [write(tmp_path / f"{name}_tests", text)]
        for name, text in (("good", PASSES), ("bad", FAILS))
    }
    with pytest.raises(AssertionError, match="== bad: exit status 1") as raised:
        run_pytest(tmp_path, files, {"COLOUR": "blue"})
    message = str(raised.value)
    assert "the first line" in message and "'blue' == 'red'" in message
    assert "== good" not in message


@pytest.mark.timeout(120)
def test_an_interruption_shows_how_far_runs_were_and_ends_them(tmp_path: Path) -> None:
    """As a time limit does."""
    inner = write(tmp_path / "tests", HANGS)
    log = tmp_path / "slow.log"

    def interrupt() -> None:
        while not log.exists() or "it has begun" not in log.read_text():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    # A shell may have told this process to ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    watcher = threading.Thread(target=interrupt, daemon=True)
    watcher.start()
    try:
        with pytest.raises(KeyboardInterrupt) as raised:
            run_pytest(tmp_path, {"slow": [inner]}, {})
    finally:
        signal.signal(signal.SIGINT, before)
    watcher.join()
    (note,) = raised.value.__notes__
    assert "== slow: exit status -9" in note and "it has begun" in note
