# SPDX-License-Identifier: Apache-2.0
"""`vllm-steering features` on the demo model."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from vllm.entrypoints.cli.steering.inputs import texts_of
from vllm_steering_cli.main import main

EXAMPLE = Path(__file__).parents[4] / "examples" / "golden_gate"
BRIDGE = json.loads((EXAMPLE / "features.json").read_text())["topics"]["bridge"]
ABOUT = "the golden gate bridge in the fog .\n\nthe bridge spans the bay .\n"
OTHERS = "the chef stirs the tomato soup .\nthe farmer feeds the cows .\n"


def test_texts_are_paragraphs_or_lines(tmp_path: Path) -> None:
    file = tmp_path / "texts"
    file.write_text("a\nb\n\n\nc\n")
    assert texts_of(str(file)) == ["a\nb", "c"]
    file.write_text(" a\n b \n")
    assert texts_of(str(file)) == ["a", "b"]
    file.write_text("\n \n")
    with pytest.raises(ValueError, match="found none"):
        texts_of(str(file))


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--text": "none"}, "No such file"),
        ({"--text": "latin"}, "latin: found no UTF-8 at byte 1, expected a UTF-8 text"),
        ({"--text": "empty"}, "empty: expected at least one text, found none"),
        ({"--model": "/no/model"}, "--model /no/model: found no such directory"),
        ({"--site": "layer"}, "--site: found 'layer', expected HOOK.LAYER such as"),
        ({"--plot": "plot.svg"}, "--plot: needs matplotlib"),
    ],
)
def test_bad_arguments_are_one_line_before_an_engine_starts(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, str],
    message: str,
) -> None:
    (tmp_path / "good").write_text(ABOUT)
    (tmp_path / "latin").write_bytes("für".encode("latin-1"))
    (tmp_path / "empty").write_text("\n\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    options = {"--model": str(EXAMPLE / "model"), "--text": "good", **changes}
    words = [word for option in options.items() for word in option]
    assert main(["features", str(EXAMPLE / "sae"), *words]) == 1
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and message in shown
