# SPDX-License-Identifier: Apache-2.0
"""API server processes share a configuration through a private file."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from vllm.config.parallel import ParallelConfig
from vllm.config.steering_environment import DIRECTORY_ENV
from vllm.config.steering_private_directory import (
    make_private_directory,
    start_up_failure,
    take_start_up_failure,
)
from vllm.engine import steering_shared_config
from vllm.engine.steering_active_config import take_over
from vllm.engine.steering_shared_config import (
    FILE,
    SharedConfig,
    shared_config,
)


def configuration(version: int) -> dict[str, Any]:
    return {"version": version, "modules": [version]}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    folder = tmp_path / "shared"
    folder.mkdir(mode=0o700)
    return folder


def test_another_process_reads_each_version_once(directory: Path) -> None:
    writer, reader = SharedConfig(str(directory)), SharedConfig(str(directory))
    assert reader.read_if_changed() is None
    for version in (1, 2):
        writer.keep(configuration(version))
        assert reader.read_if_changed() == configuration(version)
        assert reader.read_if_changed() is None


def test_nothing_is_written_before_the_first_change(directory: Path) -> None:
    SharedConfig(str(directory)).keep(configuration(0))
    assert list(directory.iterdir()) == []


def test_an_older_configuration_replaces_no_newer_one(directory: Path) -> None:
    shared = SharedConfig(str(directory))
    shared.keep(configuration(3))
    shared.keep(configuration(2))
    assert json.loads((directory / FILE).read_text())["version"] == 3
    assert [path.name for path in directory.iterdir()] == [FILE]


@pytest.mark.parametrize("whole", [False, True])
def test_what_a_cleaner_removed_is_written_again(directory: Path, whole: bool) -> None:
    shared = SharedConfig(str(directory))
    shared.keep(configuration(1))
    if whole:
        shutil.rmtree(directory)
    else:
        (directory / FILE).unlink()
    assert shared.read_if_changed() is None
    shared.keep(configuration(1))
    assert SharedConfig(str(directory)).read_if_changed() == configuration(1)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_a_directory_that_others_may_enter_is_not_used(directory: Path) -> None:
    SharedConfig(str(directory)).keep(configuration(1))
    directory.chmod(0o777)
    assert SharedConfig(str(directory)).read_if_changed() is None
    with pytest.raises(PermissionError, match="only this user"):
        SharedConfig(str(directory)).keep(configuration(2))


def test_a_full_disk_is_no_failure_of_the_change(
    monkeypatch: pytest.MonkeyPatch, directory: Path
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setenv(DIRECTORY_ENV, str(directory))
    monkeypatch.setattr(steering_shared_config, "write_private", full)
    parallel = ParallelConfig()
    parallel._api_process_count = 2
    steering = {"resolved": configuration(0)}
    config: Any = Namespace(
        additional_config={"steering": steering}, parallel_config=parallel
    )
    take_over(config, configuration(3))
    assert steering["resolved"] == configuration(3)
    assert list(directory.iterdir()) == []
    monkeypatch.undo()
    monkeypatch.setenv(DIRECTORY_ENV, str(directory))
    take_over(config, configuration(3))
    assert SharedConfig(str(directory)).read_if_changed() == configuration(3)


def test_what_could_not_be_read_once_is_read_the_next_time(
    monkeypatch: pytest.MonkeyPatch, directory: Path
) -> None:
    SharedConfig(str(directory)).keep(configuration(1))
    reader = SharedConfig(str(directory))
    with monkeypatch.context() as patched:
        patched.setattr(steering_shared_config, "read_private", lambda *_: None)
        assert reader.read_if_changed() is None
    assert reader.read_if_changed() == configuration(1)


@pytest.mark.parametrize("linked", ["directory", "file"])
def test_a_link_is_not_followed(directory: Path, tmp_path: Path, linked: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    (elsewhere / FILE).write_text(json.dumps(configuration(9)))
    if linked == "directory":
        directory.rmdir()
        directory.symlink_to(elsewhere)
    else:
        (directory / FILE).symlink_to(elsewhere / FILE)
    assert SharedConfig(str(directory)).read_if_changed() is None


def test_only_one_of_several_servers_shares(
    monkeypatch: pytest.MonkeyPatch, directory: Path
) -> None:
    monkeypatch.setenv(DIRECTORY_ENV, str(directory))
    parallel = ParallelConfig()
    assert shared_config(parallel) is None
    parallel._api_process_count = 2
    assert shared_config(parallel) is not None
    parallel._api_process_rank = -1  # the process that starts the servers
    assert shared_config(parallel) is None


def test_a_process_makes_one_private_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DIRECTORY_ENV, "/inherited/from/another/engine")
    made = make_private_directory.__wrapped__()
    assert os.environ[DIRECTORY_ENV] == made
    assert stat.S_IMODE(os.stat(made).st_mode) == 0o700
    shutil.rmtree(made)
    assert make_private_directory() == make_private_directory()


def test_a_failure_is_found_once_by_who_started_the_process(
    monkeypatch: pytest.MonkeyPatch, directory: Path
) -> None:
    monkeypatch.setenv(DIRECTORY_ENV, str(directory))
    assert take_start_up_failure() is None
    raised = start_up_failure(ValueError("module 'a':\n  W_enc has a NaN"))
    assert str(raised) == "module 'a': W_enc has a NaN"
    assert str(take_start_up_failure()) == str(raised)
    assert take_start_up_failure() is None


def test_a_failure_without_a_directory_is_raised_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(DIRECTORY_ENV, raising=False)
    assert str(start_up_failure(ValueError("no"))) == "no"
    assert take_start_up_failure() is None
