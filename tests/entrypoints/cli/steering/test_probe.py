# SPDX-License-Identifier: Apache-2.0
"""The command line: `probe` measures an SAE's fit in a real engine."""

from __future__ import annotations

import importlib
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from steering_testing.golden_gate import EXAMPLE
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm.entrypoints.cli.steering.fit import Fit, judge, measure
from vllm.entrypoints.cli.steering.probe import windows
from vllm.entrypoints.cli.steering.probe_engine import WINDOW
from vllm.entrypoints.cli.steering.probe_site import at_asked_site
from vllm.model_executor.layers.steering_state import SAEWeights
from vllm.model_executor.model_loader.sae_formats.native import MANIFEST
from vllm.model_executor.model_loader.sae_loader import inspect_module
from vllm_steering_cli.main import main

MODEL, SAE = str(EXAMPLE / "model"), str(EXAMPLE / "sae")
sys.path.insert(0, str(EXAMPLE))
corpus: Any = importlib.import_module("corpus")
jumprelu: Any = importlib.import_module("jumprelu")
TOKENS = 600


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file in the demo model's language, with special tokens in it."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    documents = itertools.islice(corpus.documents(seed=99), 12)
    path.write_text(" ".join(" ".join(document.words) for document in documents))
    return str(path)


def probed(
    capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0
) -> dict[str, Any]:
    """The site reports of a `probe`, by site name."""
    common = ["--model", MODEL, "--dtype", "float32", "--max-tokens", str(TOKENS)]
    assert main(["probe", *arguments, *common, "--json"]) == status
    data = json.loads(capsys.readouterr().out)
    return {site["name"]: site for site in data["sites"]}


@pytest.fixture(scope="module")
def oracle(text: str) -> tuple[float, float, int]:
    """(L0, FVU, tokens bypassed) at layer 1's output, by Hugging Face."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    ids = tokenizer(Path(text).read_text(), verbose=False).input_ids
    kept, bypassed = [], 0
    for prompt in windows(ids, tokenizer.bos_token_id, TOKENS):
        with torch.no_grad():
            states = model(torch.tensor([prompt]), output_hidden_states=True)
        read = ~torch.isin(torch.tensor(prompt), torch.tensor([0, 1, 2]))
        kept.append(states.hidden_states[2][0][read])
        bypassed += int((~read).sum())
    sae = jumprelu.JumpReLUSAE.load(EXAMPLE / "sae")
    l0, fvu = jumprelu.quality(sae, torch.cat(kept))
    return l0, fvu, bypassed


@pytest.mark.engine
def test_the_demo_fits_as_hugging_face_and_its_readme_say(
    text: str,
    oracle: tuple[float, float, int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    l0, fvu, bypassed = oracle
    site = probed(capsys, SAE, "--text", text)["post_block.1"]
    assert site["fit"]["fvu"] == pytest.approx(fvu, rel=1e-3)
    assert site["fit"]["l0"] == pytest.approx(l0, rel=1e-3)
    assert site["bypassed"] == bypassed > 1
    stated = json.loads((EXAMPLE / "features.json").read_text())
    assert site["fit"]["l0"] == pytest.approx(stated["l0"], rel=0.2)
    assert abs(site["fit"]["fvu"] - stated["fvu"]) < 0.02
    assert site["warnings"] == []
    # The same SAE at other layers, which it was not trained on.
    assert set(site["nearby"]) == {"post_block.0", "post_block.2", "post_block.3"}
    assert min(site["nearby"].values()) > 3 * site["fit"]["fvu"]


def test_measuring_elsewhere_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with at_asked_site(SAE, ["resid_post.3"]) as (path, sites):
        (moved,) = inspect_module("moved", path, sites=sites).sites
    assert moved.name == "post_block.3"
    said = capsys.readouterr().err
    assert "the files say post_block.1; measured at post_block.3" in said
    with at_asked_site(SAE, ["post_block.1"]) as place:
        assert place == (SAE, ["post_block.1"])


@pytest.mark.engine
@pytest.mark.parametrize("layer", [0, 3])
def test_a_wrong_layer_is_flagged_and_the_right_one_named(
    text: str, layer: int, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--text", text, "--site", f"post_block.{layer}"]
    site = probed(capsys, SAE, *arguments, status=1)[f"post_block.{layer}"]
    assert "fits post_block.1 better" in site["warnings"][-1]
    hopeless = any("explains next to nothing" in line for line in site["warnings"])
    assert hopeless == (layer == 3)


@pytest.mark.engine
def test_every_site_is_held_against_its_own_claims(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    native = tmp_path / "native"
    assert main(["convert", SAE, str(native)]) == 0
    manifest = native / MANIFEST
    data = json.loads(manifest.read_text())
    (site,) = data["sites"]
    # The block's output is the next block's input; the other point has another fit.
    data["sites"] = [
        site | {"fvu": 0.025, "l0": 13.0},
        site | {"layer": 2, "hook": "pre_attn", "fvu": 0.025, "l0": 100.0},
        site | {"layer": 1, "hook": "post_attn", "fvu": 0.025},
    ]
    manifest.write_text(json.dumps(data))
    capsys.readouterr()
    common = ["--model", MODEL, "--dtype", "float32", "--max-tokens", str(TOKENS)]
    assert main(["probe", str(native), "--text", text, *common]) == 1
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines[1:4]}
    assert rows["post_block.1"][3::2] == ["0.025", "13"]
    assert rows["pre_attn.2"][:3] == rows["post_block.1"][:3]
    assert rows["pre_attn.2"][3::2] == ["0.025", "100"]
    assert float(rows["post_attn.1"][2]) > 2 * float(rows["post_block.1"][2])
    assert rows["post_attn.1"][5] == "-"
    warnings = [line for line in lines if line.startswith("warning: ")]
    assert not [line for line in warnings if "post_block.1: " in line]
    assert [line for line in warnings if "pre_attn.2: L0" in line]
    assert [line for line in warnings if "post_attn.1: FVU" in line]


@pytest.mark.engine
@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--site", "post_block.9"], "expected 0..3"),
        (["--text", "no such file"], "no such file"),
    ],
)
def test_what_cannot_be_probed_is_one_line_and_status_one(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["probe", SAE, "--model", MODEL, *arguments]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and expected in error


def test_a_text_without_words_is_refused_before_an_engine_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "text"
    file.write_text(" \n")
    assert main(["probe", SAE, "--model", "no-model", "--text", str(file)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"error: --text {file}: expected at least one word, found none"


def test_vectors_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "v.safetensors"
    save_file({"layers.1.post_block": torch.ones(96)}, path)
    assert main(["probe", str(path), "--model", MODEL]) == 1
    assert "found steering vectors, expected an SAE" in capsys.readouterr().err


@pytest.mark.parametrize("count", ["0", "-1", "many"])
def test_max_tokens_is_a_positive_integer(
    count: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["probe", SAE, "--model", MODEL, "--max-tokens", count])
    assert caught.value.code == 2
    assert "expected an integer >= 1" in capsys.readouterr().err


# --- The measure and the verdict, without an engine ---------------------------


def identity(features: int, norm_limit: float | None = None) -> SAEWeights:
    """An SAE of +-unit vectors, which reconstructs everything."""
    weights = SAEWeights(2 * features, features, torch.float32, torch.device("cpu"))
    eye = torch.eye(features)
    weights.W_enc.copy_(torch.cat([eye, -eye]))
    weights.W_dec.copy_(weights.W_enc)
    weights.b_enc.zero_()
    weights.threshold.zero_()
    if norm_limit is not None:
        weights.norm_limit.fill_(norm_limit)
    return weights


def test_an_identity_leaves_no_variance_unexplained() -> None:
    x = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    fit = measure(identity(8), x)
    assert fit.tokens == 300
    assert fit.fvu < 1e-12
    assert fit.l0 == 8


def test_the_mean_alone_leaves_all_of_it() -> None:
    x = torch.randn(300, 8, generator=torch.Generator().manual_seed(0)) + 5
    weights = identity(8)
    weights.threshold.fill_(float("inf"))
    weights.b_dec.copy_(x.mean(0))
    fit = measure(weights, x)
    assert fit.fvu == pytest.approx(1, abs=1e-5)
    assert fit.l0 == 0


def test_tokens_past_the_norm_limit_do_not_count() -> None:
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    outlier = torch.full((1, 8), 1e6)
    assert measure(identity(8, 100.0), torch.cat([x, outlier])).tokens == 20
    with pytest.raises(ValueError, match="norm_guard"):
        measure(identity(8, 100.0), outlier)


def test_a_sink_is_found_and_the_options_that_leave_it_alone_are_said() -> None:
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    assert measure(identity(8), x).large == 0
    x = torch.cat([x, torch.full((1, 8), 1e3)])
    fit = measure(identity(8), x)
    median = float(x.norm(dim=1).median())
    assert (fit.large, fit.median_norm) == (1, pytest.approx(median))
    (said,) = judge("post_block.1", fit, {}, {})
    assert said.startswith("post_block.1: 1 of 21 tokens have a norm above 10 times")
    assert f"norm_guard=10 and reference_norm={median:.4g}" in said


def test_one_stream_alone_has_no_variance_to_explain() -> None:
    with pytest.raises(ValueError, match="expected tokens that differ"):
        measure(identity(8), torch.ones(5, 8))


@pytest.mark.parametrize(
    "fit, declared, nearby, expected",
    [
        ((0.2, 50), {}, {}, None),
        ((0.2, 50), {"fvu": 0.15, "l0": 60}, {"a": 0.15}, None),
        ((0.95, 50), {}, {}, "explains next to nothing"),
        ((0.4, 50), {"fvu": 0.15}, {}, "declared 0.15"),
        ((0.2, 50), {"l0": 101}, {}, "declared 101"),
        ((0.2, 50), {"l0": 24}, {}, "declared 24"),
        ((0.2, 50), {}, {"a": 0.3, "b": 0.09}, "fits b better"),
        ((0.04, 50), {}, {"a": 0.001}, None),
        ((0.2, float("nan")), {"l0": 50}, {}, "L0 nan"),
        ((float("nan"), 50), {}, {}, "FVU nan"),
    ],
)
def test_a_site_is_judged_by_its_claims_and_its_surroundings(
    fit: tuple[float, float],
    declared: dict[str, float],
    nearby: dict[str, float],
    expected: str | None,
) -> None:
    found = judge("post_block.1", Fit(100, *fit), declared, nearby)
    if expected is None:
        assert found == []
    else:
        (warning,) = found
        assert warning.startswith("post_block.1: ") and expected in warning


def test_every_prompt_begins_as_the_text_does() -> None:
    ids = [1, *range(10, 610)]
    prompts = windows(ids, 1, max_tokens=1000)
    assert all(prompt[0] == 1 and len(prompt) < WINDOW for prompt in prompts)
    assert [token for prompt in prompts for token in prompt[1:]] == ids[1:]
    assert [len(prompt) for prompt in windows(ids, 1, max_tokens=10)] == [10]
    plain = windows(ids[1:], 1, max_tokens=1000)
    assert [token for prompt in plain for token in prompt] == ids[1:]
    assert windows([], 1, 10) == windows([1], 1, 10) == []
