# SPDX-License-Identifier: Apache-2.0
"""A module of two layers in a notebook: surveys, their evidence, clamps by site."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from steering_testing.engine import save_sae
from steering_testing.golden_gate import EXAMPLE, example_engine
from steering_testing.reference import random_sae

from vllm import LLM
from vllm.config.sae_steering_types import (
    SAEClampEntry,
    SAEClampSpec,
    SteeringSamplingParams,
)
from vllm.entrypoints.cli.steering import survey as command_module
from vllm.entrypoints.serve.steering.evidence import of_features
from vllm.entrypoints.steering import encode, evaluate, find_features, survey, surveyed
from vllm.exceptions import VLLMValidationError
from vllm_steering_cli.main import main

pytestmark = pytest.mark.engine
MODULE = "golden-gate"
SITES = ("post_block.1", "post_block.2")
WIDTH, HIDDEN = 128, 96
TEXTS = ["the golden gate bridge in the fog .", "the chef stirs the tomato soup ."]


@pytest.fixture(scope="module")
def sae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("several") / "sae"
    saes = {
        (layer, "post_block"): random_sae(WIDTH, HIDDEN, "relu", layer)
        for layer in (1, 2)
    }
    save_sae(path, saes)
    return path


@pytest.fixture(scope="module")
def llm(sae: Path) -> Iterator[LLM]:
    with example_engine(sae) as llm:
        yield llm


def largest(llm: LLM, site: str) -> np.ndarray:
    """`[F]`: the largest activation of each feature, read by index."""
    texts = encode(llm, MODULE, TEXTS, sites=site, features=range(WIDTH))
    return np.concatenate([text.site(site).to_dense() for text in texts]).max(0)


def test_each_site_has_evidence_of_its_own(llm: LLM, sae: Path) -> None:
    file = sae / "evidence.json"
    file.write_text(json.dumps({"neuronpedia": "m/1", "card": {"fvu": 0.5}}))
    for site in SITES:
        found = survey(llm, MODULE, TEXTS, site=site)
        assert found.site == site and found.of_several
        found.save(sae)
    content = json.loads(file.read_text())
    assert content.keys() == {"neuronpedia", "card", "sites"}
    assert content["sites"].keys() == set(SITES)
    maxima = {site: largest(llm, site) for site in SITES}
    assert not np.allclose(*maxima.values(), rtol=0.1)
    strongest = int(maxima[SITES[1]].argmax())
    for site in SITES:
        told = of_features(str(sae), [strongest], site)
        known = told["features"][str(strongest)]
        assert known["max"] == pytest.approx(maxima[site][strongest], rel=1e-3)
        assert known["neuronpedia"] == "m/1"
        assert told["sites"].keys() == set(SITES) and told["card"] == {"fvu": 0.5}
        assert all(figures.keys() == {"l0"} for figures in told["sites"].values())
    assert len(known["contexts"]) == 2


def test_a_file_that_a_server_would_not_read_is_refused(
    llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "evidence.json"
    survey(llm, MODULE, TEXTS, site=SITES[0]).save(file)
    before = file.read_text()
    monkeypatch.setattr(surveyed, "MAX_EVIDENCE", 100)
    with pytest.raises(ValueError, match=r"evidence.json: found \d+ bytes .*most 100"):
        survey(llm, MODULE, TEXTS, site=SITES[1]).save(file)
    assert file.read_text() == before


def test_a_clamp_by_the_name_of_a_site_acts_there_alone(llm: LLM) -> None:
    def read(**clamps: Any) -> list[np.ndarray]:
        specs = [SAEClampSpec(MODULE, clamps)] if clamps else []
        steering = {"sae_clamp_specs": specs}
        (text,) = encode(llm, MODULE, TEXTS[0], features=[3, 5], steering=steering)
        return [text.site(site).values for site in SITES]

    plain, entry = read(), SAEClampEntry(5, "additive", 40.0)
    first, second = read(**{SITES[1]: [entry]})
    np.testing.assert_array_equal(first, plain[0])  # layer 1 is before the clamp
    assert not np.allclose(second, plain[1])
    for at, both in enumerate(zip(read(**{SITES[0]: [entry]}), plain, strict=True)):
        assert not np.allclose(*both), at


@pytest.mark.parametrize("call", [survey, find_features])
def test_one_of_several_sites_must_be_named(llm: LLM, call: Any) -> None:
    with pytest.raises(ValueError, match="^site: .* several sites.*post_block.1', 'po"):
        call(llm, MODULE, TEXTS)
    with pytest.raises(
        ValueError, match="^site: found 'post_block.3', expected a site"
    ):
        call(llm, MODULE, TEXTS, site="post_block.3")
    assert call(llm, MODULE, TEXTS, site=("resid_post", 2)).site == SITES[1]


def test_a_list_of_clamps_for_several_sites_is_refused_with_their_names(
    llm: LLM,
) -> None:
    spec = SAEClampSpec(MODULE, [SAEClampEntry(1, "absolute", 1.0)])
    params = SteeringSamplingParams(max_tokens=1, sae_clamp_specs=[spec])
    with pytest.raises(
        VLLMValidationError, match="has 2 sites: 'post_block.1', 'post_block.2'"
    ):
        llm.generate(TEXTS, params, use_tqdm=False)


def test_every_site_is_evaluated(llm: LLM) -> None:
    both = evaluate(llm, MODULE, TEXTS)
    assert [one.site for one in both] == list(SITES)
    forms: list[Any] = [SITES[1], ("resid_post", 2), [SITES[1]], {"post_block": [2]}]
    for sites in forms:
        (one,) = evaluate(llm, MODULE, TEXTS, sites=sites)
        assert one.site == SITES[1]
        assert one.fvu == pytest.approx(both[1].fvu)


def test_parts_of_results_have_their_methods(llm: LLM) -> None:
    texts = encode(llm, MODULE, TEXTS, top_k=2)
    whole = texts.to_pandas()
    assert texts[:1].to_pandas().equals(whole[whole.text == 0])
    assert (texts[:1] + texts[1:]).to_pandas().equals(whole)
    assert pickle.loads(pickle.dumps(texts)).to_pandas().equals(whole)
    rows = evaluate(llm, MODULE, TEXTS)
    assert list(rows[1:].to_pandas().site) == [SITES[1]]
    found = find_features(llm, MODULE, TEXTS[:1], TEXTS[1:], site=SITES[0], top=3)
    best = found[:2].to_pandas()
    assert best.equals(found.to_pandas()[:2]) and found[:2].warnings == found.warnings


def test_sites_that_a_module_does_not_have_are_not_evaluated(llm: LLM) -> None:
    wrong = {
        "post_block.3": "sites[0]: .*does not cover layer 3 at post_block.*one of its",
        "middle": "sites[0]: found 'middle', expected a site of module 'golden-gate'",
    }
    for site, message in wrong.items():
        for call in (evaluate, encode):
            pattern = "^" + message.replace("[", r"\[").replace("]", r"\]")
            with pytest.raises(ValueError, match=pattern):
                call(llm, MODULE, TEXTS, sites=site)
    with pytest.raises(ValueError, match=r"^sites\[1\]: post_block.1 is given twice"):
        evaluate(llm, MODULE, TEXTS, sites=[SITES[0], ("resid_post", 1)])


def test_the_command_adds_one_site_to_the_file(
    llm: LLM, sae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "evidence.json"
    kept = {"max": [1.0, 2.0], "l0": 3}
    out.write_text(json.dumps({"sites": {SITES[0]: kept}}))
    found = survey(llm, MODULE, TEXTS, site=SITES[1])
    told = found.to_evidence()
    # The command's engine has one site of the module, so a survey there has no other.
    found.of_several = False
    monkeypatch.setattr(command_module, "probing_engine", lambda *_: _Engine())
    monkeypatch.setattr(command_module, "windows_of", lambda *_: [[5]])
    monkeypatch.setattr(command_module, "survey_texts", lambda *_, **__: found)
    (tmp_path / "a").write_text("the bridge .\n")
    model = str(EXAMPLE / "model")
    command = ["survey", str(sae), "--model", model, "--text", str(tmp_path / "a")]
    assert main([*command, "--site", SITES[1], "--out", str(out)]) == 0
    written = json.loads(out.read_text())
    assert written == {"sites": {SITES[0]: kept, **told["sites"]}}
    assert main(command) == 1


class _Engine:
    """Stands for the command's engine."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None
