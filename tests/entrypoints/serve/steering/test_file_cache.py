# SPDX-License-Identifier: Apache-2.0
"""Files beside modules are read once, however many clients ask at once."""

from __future__ import annotations

import errno
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vllm.entrypoints.serve.steering import file_cache
from vllm.entrypoints.serve.steering.file_cache import FileCache


class Reads:
    """Reads texts slowly, refuses `bad`, and remembers what was read."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def __call__(self, path: Path) -> str:
        text = path.read_text()
        self.done.append(text)
        time.sleep(0.05)
        if text == "bad":
            raise ValueError(f"{path.name} is bad")
        return text


@pytest.fixture
def reads() -> Reads:
    return Reads()


def test_many_who_ask_at_once_share_one_reading(tmp_path: Path, reads: Reads) -> None:
    (tmp_path / "a").write_text("one")
    cache = FileCache(reads)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(cache.get, [tmp_path / "a"] * 8))
    assert found == ["one"] * 8
    assert reads.done == ["one"]


def test_a_changed_file_is_read_again_and_a_missing_one_is_none(
    tmp_path: Path, reads: Reads
) -> None:
    file = tmp_path / "a"
    cache = FileCache(reads)
    assert cache.get(file) is None
    file.write_text("one")
    assert cache.get(file) == "one"
    file.write_text("three")
    assert cache.get(file) == "three"
    file.unlink()
    assert cache.get(file) is None
    assert reads.done == ["one", "three"]


def test_an_error_is_kept_until_the_file_changes(tmp_path: Path, reads: Reads) -> None:
    file = tmp_path / "a"
    file.write_text("bad")
    cache = FileCache(reads)
    for _ in range(3):
        with pytest.raises(ValueError, match="a is bad"):
            cache.get(file)
    assert reads.done == ["bad"]
    file.write_text("mended")
    assert cache.get(file) == "mended"


def test_an_error_of_the_system_is_over_when_it_is_over(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_text("one")
    left = [OSError(errno.EMFILE, "Too many open files")]

    def read(path: Path) -> str:
        if left:
            raise left.pop()
        return path.read_text()

    cache = FileCache(read)
    with pytest.raises(OSError, match="Too many"):
        cache.get(file)
    assert cache.get(file) == "one"


def test_a_pipe_is_not_waited_for(tmp_path: Path, reads: Reads) -> None:
    os.mkfifo(tmp_path / "pipe")
    cache = FileCache(reads)
    for place in (tmp_path / "pipe", tmp_path):
        with pytest.raises(ValueError, match="no regular file"):
            cache.get(place)
    assert reads.done == []


def test_the_files_asked_for_last_are_kept(
    tmp_path: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_cache, "MAX_BYTES", 40)
    cache = FileCache(reads)
    files = [tmp_path / str(at) for at in range(5)]
    for file in files:
        file.write_text(file.name * 10)
    for file in (*files[:-1], files[0], files[-1]):
        assert cache.get(file) == file.name * 10
    reads.done.clear()
    cache.get(files[0])  # it was asked for again before the last one
    assert reads.done == []
    cache.get(files[1])
    assert reads.done == ["1" * 10]
    # One that is larger than all may be together is kept alone.
    files[1].write_text("2" * 99)
    for _ in range(2):
        assert cache.get(files[1]) == "2" * 99
    assert reads.done[1:] == ["2" * 99]
