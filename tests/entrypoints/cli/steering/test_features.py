# SPDX-License-Identifier: Apache-2.0
"""`vllm-steering features` on the demo model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from steering_testing.engine import save_sae
from steering_testing.golden_gate import BRIDGE, EXAMPLE
from steering_testing.reference import random_sae

from vllm.entrypoints.cli.steering import features as command_module
from vllm.entrypoints.cli.steering.inputs import texts_of
from vllm_steering_cli.main import main

ABOUT = "the golden gate bridge in the fog .\n\nthe bridge spans the bay .\n"
OTHERS = "the chef stirs the tomato soup .\nthe farmer feeds the cows .\n"


def test_texts_are_paragraphs_or_lines(tmp_path: Path) -> None:
    file = tmp_path / "texts"
    file.write_text("a\nb\n\n\nc\n")
    assert texts_of("--text", str(file)) == ["a\nb", "c"]
    file.write_text(" a\n b \n")
    assert texts_of("--text", str(file)) == ["a", "b"]
    file.write_text("\n \n")
    with pytest.raises(ValueError, match="found none"):
        texts_of("--text", str(file))


def test_features_are_ranked_labelled_and_shown_in_context(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a").write_text(ABOUT)
    (tmp_path / "b").write_text(OTHERS)
    labels = [{"index": str(BRIDGE["feature"]), "description": "the bridge"}]
    (tmp_path / "labels").write_text(json.dumps(labels))
    command = ["features", str(EXAMPLE / "sae"), "--model", str(EXAMPLE / "model")]
    command += ["--text", str(tmp_path / "a"), "--against", str(tmp_path / "b")]
    command += ["--labels", str(tmp_path / "labels"), "--dtype", "float32"]
    assert main([*command, "--top", "5"]) == 0
    shown = capsys.readouterr()
    assert "post_block.1: 5 features" in shown.out
    assert "the bridge" in shown.out and "[" in shown.out
    assert "at least three" in shown.err
    plot = tmp_path / "plot.svg"
    assert main([*command, "--json", "--plot", str(plot)]) == 0
    found = json.loads(capsys.readouterr().out)
    indices = [one["feature_idx"] for one in found["features"]]
    assert BRIDGE["feature"] in indices[:5]
    assert 0 < found["fit"]["fvu"] < 1
    best = next(f for f in found["features"] if f["feature_idx"] == BRIDGE["feature"])
    assert best["label"] == "the bridge" and best["examples"]
    # Words of a plot are paths; their text stands beside them as comments.
    drawn = plot.read_text()
    assert f"{BRIDGE['feature']} the bridge ({best['auroc']:.2f})" in drawn
    assert "post_block.1 (AUROC)" in drawn


def test_labels_beside_the_module_are_found_and_a_misfit_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(EXAMPLE / "sae", tmp_path / "sae")
    labels = {str(BRIDGE["feature"]): "from beside"}
    (tmp_path / "sae" / "labels.json").write_text(json.dumps(labels))
    (tmp_path / "a").write_text(ABOUT + "\nzyzzyva quark xylophone qwerty\n")
    command = ["features", str(tmp_path / "sae"), "--model", str(EXAMPLE / "model")]
    command += ["--text", str(tmp_path / "a"), "--dtype", "float32", "--top", "200"]
    assert main(command) == 0
    shown = capsys.readouterr()
    assert "from beside" in shown.out and "FVU" not in shown.err
    assert "unknown to the model" in shown.err
    # Every feature decodes as its neighbour: the reconstruction is worth nothing.
    weights = load_file(tmp_path / "sae" / "sae_weights.safetensors")
    weights["W_dec"] = weights["W_dec"].roll(1, dims=0).contiguous()
    save_file(weights, tmp_path / "sae" / "sae_weights.safetensors")
    assert main(command) == 0
    shown = capsys.readouterr()
    assert "FVU" in shown.err and "model, layer and hook" in shown.err


def test_standard_output_is_json_and_nothing_else(tmp_path: Path) -> None:
    """In a process of its own, because vLLM's log goes to the process's stdout."""
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbf" + ABOUT.encode())
    command = [sys.executable, "-m", "vllm.entrypoints.steering", "features"]
    command += [str(EXAMPLE / "sae"), "--model", str(EXAMPLE / "model"), "--json"]
    command += ["--text", str(tmp_path / "a"), "--top", "2", "--dtype", "float32"]
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_LOGGING_LEVEL"}
    done = subprocess.run(command, capture_output=True, env=environment, check=True)
    found = json.loads(done.stdout)
    assert found["module"] == str(EXAMPLE / "sae")
    assert found["model"] == str(EXAMPLE / "model")
    assert len(found["features"]) == 2 and found["features"][0]["auroc"] is None
    # A byte order mark is no word of the text.
    assert not found["features"][0]["examples"][0]["before"].startswith("\ufeff")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text", "none"], "--text {}/none: No such file"),
        (["--text", "."], "--text {}/.: Is a directory"),
        (["--text", "bytes"], "--text {}/bytes: found no UTF-8 at byte 3, expected"),
        (["--text", "blank"], "--text {}/blank: expected at least one text"),
        (["--against", "none"], "--against {}/none: No such file"),
        (["--labels", "none"], "--labels {}/none: No such file"),
        (["--labels", "a"], "{}/a: found no JSON in line 1"),
        (["--plot", "none/x.png"], "expected a file in a directory that exists"),
        (["--plot", "x.foo"], "expected a name that ends in one of .avif"),
        (["--plot", "x"], "expected a name that ends in one of"),
        (["--top", "257"], "--top: found 257, expected an integer in 1..256"),
        (["--site", "post_block"], "--site: found 'post_block', expected HOOK.LAYER"),
        (["--site", "post_block.3"], "the files say post_block.1"),
        (["--model", "none"], "--model {}/none: found no such directory"),
        (["--model", "."], "--model {}/.: found a directory without config.json"),
    ],
)
def test_a_bad_argument_is_one_line_before_the_model_is_loaded(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(command_module, "probing_engine", None)
    (tmp_path / "a").write_text(ABOUT)
    (tmp_path / "bytes").write_bytes(b"abc\xff")
    (tmp_path / "blank").write_text(" \n\n")
    command = ["features", str(EXAMPLE / "sae"), "--model", str(EXAMPLE / "model")]
    command += ["--text", str(tmp_path / "a")]
    name, value = options
    files = ("--text", "--against", "--labels", "--plot", "--model")
    assert (
        main([*command, name, f"{tmp_path}/{value}" if name in files else value]) == 1
    )
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    assert shown.err.startswith("error: ") and message.format(tmp_path) in shown.err


@pytest.mark.parametrize("command", ["features", "survey"])
def test_modules_that_are_not_one_sae_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    sae = random_sae(8, 16, "relu", seed=1)
    several = save_sae(
        tmp_path / "sae", {(0, "post_block"): sae, (1, "post_block"): sae}
    )
    np.save(tmp_path / "vector.npy", np.ones(16, dtype=np.float32))
    (tmp_path / "a").write_text(ABOUT)
    options = ["--model", str(EXAMPLE / "model"), "--text", str(tmp_path / "a")]
    assert main([command, several, *options]) == 1
    assert "--site: the module has several sites" in capsys.readouterr().err
    vector = [str(tmp_path / "vector.npy"), "--site", "post_block.1"]
    assert main([command, *vector, *options]) == 1
    assert "found steering vectors, expected an SAE" in capsys.readouterr().err


def test_a_plot_without_matplotlib_is_refused_at_once(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    (tmp_path / "a").write_text(ABOUT)
    command = ["features", str(EXAMPLE / "sae"), "--model", str(EXAMPLE / "model")]
    command += ["--text", str(tmp_path / "a"), "--plot", str(tmp_path / "x.png")]
    assert main(command) == 1
    assert "pip install matplotlib" in capsys.readouterr().err
