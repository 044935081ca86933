# SPDX-License-Identifier: Apache-2.0
"""What users keep is written whole or not at all, whatever the disk says."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vllm.config.steering_written_files import whole_file
from vllm.model_executor.model_loader.sae_loader import save_native


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def content_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_file_is_replaced_and_keeps_its_permissions_and_link(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_text("old")
    real.chmod(0o640)
    link.symlink_to(real)
    with whole_file(link) as file:
        file.write(b"new")
        assert real.read_text() == "old"
    assert (real.read_text(), link.is_symlink()) == ("new", True)
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    assert set(content_of(tmp_path)) == {"real", "link"}


def test_a_new_file_has_the_permissions_of_any_other(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    with whole_file(tmp_path / "new") as file:
        file.write(b"new")
    other, new = ((tmp_path / name).stat().st_mode for name in ("other", "new"))
    assert new == other


@pytest.mark.parametrize(
    ("verb", "there"),
    [
        ("fsync", True),
        ("fsync", False),
        ("chmod", True),
        ("replace", True),
        ("replace", False),
    ],
)
def test_a_full_disk_leaves_what_was_there_and_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, there: bool
) -> None:
    path = tmp_path / "kept.json"
    if there:
        path.write_text("old")
    before = content_of(tmp_path)
    monkeypatch.setattr(os, verb, full_disk)
    with pytest.raises(OSError, match="No space left") as error, whole_file(path) as f:
        f.write(b"new")
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(path))
    assert content_of(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("folder", IsADirectoryError),
        ("no/file", FileNotFoundError),
        ("file/below", NotADirectoryError),
    ],
)
def test_a_place_for_no_file_is_named(
    tmp_path: Path, name: str, kind: type[OSError]
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    path = tmp_path / name
    with pytest.raises(kind) as error, whole_file(path) as file:
        file.write(b"new")
    assert str(path.parent) in str(error.value)
    assert {file.name for file in tmp_path.iterdir()} == {"folder", "file"}


def test_a_pipe_is_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="regular") as error, whole_file(pipe) as file:
        file.write(b"new")
    assert error.value.filename == str(pipe)
    assert pipe.is_fifo() and len(list(tmp_path.iterdir())) == 1


def test_a_module_that_cannot_be_saved_again_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(value: float) -> None:
        weights: dict[str, Any] = {
            "W_enc": np.full((4, 2), value, np.float32),
            "b_enc": np.zeros(4, np.float32),
            "W_dec": np.full((4, 2), value, np.float32),
            "b_dec": np.zeros(2, np.float32),
        }
        save_native(tmp_path, {"post_block.1": {**weights, "activation": "relu"}})

    save(1.0)
    before = content_of(tmp_path)
    assert set(before) == {"manifest.json", "post_block.1.safetensors"}
    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", full_disk)
        with pytest.raises(OSError, match=r"post_block\.1\.safetensors"):
            save(2.0)
    assert content_of(tmp_path) == before
    save(2.0)
    assert content_of(tmp_path) != before
