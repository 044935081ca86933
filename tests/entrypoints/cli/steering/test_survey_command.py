# SPDX-License-Identifier: Apache-2.0
"""`vllm-steering survey`: what is refused before a model is loaded, and its JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from steering_testing.golden_gate import BRIDGE, EXAMPLE

from vllm.entrypoints.cli.steering import survey as command_module
from vllm_steering_cli.main import main

SAE = str(EXAMPLE / "sae")


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    (tmp_path / "a").write_text("the golden gate bridge in the fog .\n")
    model = str(EXAMPLE / "model")
    return ["survey", SAE, "--model", model, "--text", str(tmp_path / "a")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--feature", "512"], "--feature: found 512, expected an integer in 0..511"),
        (["--out", "/no/such/directory/x"], "--out /no/such/directory/x: expected a"),
        (["--labels", "/no/labels"], "--labels /no/labels: No such file"),
        (["--site", "2"], "--site: found '2', expected HOOK.LAYER"),
        (["--site", "post_block.0"], "but sites names post_block.0"),
    ],
)
def test_a_bad_argument_is_one_line_before_the_model_is_loaded(
    command: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(command_module, "probing_engine", None)
    assert main([*command, *options]) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    assert shown.err.startswith("error: ") and message in shown.err


def test_a_feature_is_a_number(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--feature", "-1"])
    assert stopped.value.code == 2
    assert "found '-1', expected an integer >= 0" in capsys.readouterr().err


@pytest.mark.engine
def test_the_file_has_what_the_json_says(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--json", "--out", str(tmp_path)]) == 0
    told = json.loads(capsys.readouterr().out)
    written = json.loads((tmp_path / "evidence.json").read_text())
    assert told["tokens"] > 5 and told["module"] == SAE and told["warnings"] == []
    assert {key: told[key] for key in written} == written
    assert written["max"][BRIDGE["feature"]] > 1
