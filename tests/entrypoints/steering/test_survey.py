# SPDX-License-Identifier: Apache-2.0
"""`survey` on the demo model: what each feature does on a corpus."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from steering_testing.golden_gate import BRIDGE, EXAMPLE, MODULE, example_engine

from vllm import LLM
from vllm.entrypoints.serve.steering.evidence import of_features
from vllm.entrypoints.steering import SiteEvaluation, Survey, encode, survey, surveyed
from vllm.entrypoints.steering import survey as survey_texts

FEATURE = BRIDGE["feature"]
D_SAE = 512
TEXTS = [
    "the golden gate bridge in the fog .",
    "the golden gate bridge in the fog at night .",
    "we walk over the bridge in the fog .",
    "the bridge spans the bay .",
    "the chef stirs the tomato soup .",
    "the farmer feeds the cows .",
]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    sae = tmp_path_factory.mktemp("surveyed") / "sae"
    shutil.copytree(EXAMPLE / "sae", sae)
    (sae / "labels.json").write_text(json.dumps({str(FEATURE): "the bridge"}))
    with example_engine(sae) as llm:
        yield llm


@pytest.fixture(scope="module")
def found(llm: LLM) -> Survey:
    return survey(llm, MODULE, TEXTS, examples=3)


@pytest.fixture(scope="module")
def dense(llm: LLM) -> list[np.ndarray]:
    """For each text `[tokens, F]`: every activation, read by index."""
    texts = encode(llm, MODULE, TEXTS, features=range(D_SAE))
    return [text.site().to_dense() for text in texts]


def test_statistics_are_those_of_all_activations(
    found: Survey, dense: list[np.ndarray]
) -> None:
    f = np.concatenate(dense)
    assert found.tokens == len(f) and len(found) == D_SAE
    assert found.l0 == pytest.approx((f != 0).sum(1).mean())
    np.testing.assert_allclose(found.max, f.max(0), rtol=1e-5)
    np.testing.assert_allclose(found.frequency, (f != 0).mean(0), rtol=1e-6)
    for feature in np.flatnonzero(f.any(0)):
        own = f[:, feature][f[:, feature] != 0]
        for q, got in ((0.5, found.p50), (0.99, found.p99)):
            wanted = np.quantile(own, q, method="higher")
            assert got[feature] == pytest.approx(wanted, rel=1e-5)
    assert not found.warnings


def test_examples_are_the_strongest_tokens_of_different_texts(
    llm: LLM, found: Survey, dense: list[np.ndarray]
) -> None:
    one = found[FEATURE]
    assert one.label == "the bridge" and one.max == pytest.approx(found.max[FEATURE])
    values = [example.value for example in one.examples]
    strongest = sorted({float(rows[:, FEATURE].max()) for rows in dense}, reverse=True)
    assert values == pytest.approx(strongest[: len(values)], rel=1e-5)
    assert len({example.before for example in one.examples}) == len(one.examples) == 3
    assert survey(llm, MODULE, TEXTS, examples=0).examples == {}
    assert set(found.examples) == set(np.flatnonzero(found.max))


def test_texts_are_read_in_parts(
    llm: LLM, found: Survey, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = __import__(survey_texts.__module__, fromlist=["TEXTS_AT_ONCE"])
    monkeypatch.setattr(module, "TEXTS_AT_ONCE", 2)
    parts = survey(llm, MODULE, TEXTS, examples=3)
    assert parts.to_evidence() == found.to_evidence()


def test_the_playground_reads_what_is_saved(
    found: Survey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "evidence.json"
    kept = {"neuronpedia": "m/1", "sites": {found.site: {"fvu": 0.1}}}
    file.write_text(json.dumps(kept))
    found.save(tmp_path)
    told = of_features(str(tmp_path), [FEATURE])
    known = told["features"][str(FEATURE)]
    assert told["sites"] == {found.site: {"fvu": 0.1, "l0": round(found.l0, 2)}}
    assert known["neuronpedia"] == "m/1"
    assert known["max"] == pytest.approx(found.max[FEATURE], rel=1e-3)
    assert len(known["contexts"]) == 3
    # A file that a server would refuse to read has fewer examples.
    monkeypatch.setattr(surveyed, "MAX_EVIDENCE", file.stat().st_size - 10)
    found.save(file)
    fewer = json.loads(file.read_text())
    assert max(map(len, fewer["contexts"].values())) == 2
    file.write_text("[]")
    with pytest.raises(ValueError, match="found no JSON object"):
        found.save(file)


def test_a_full_disk_leaves_the_evidence_that_was_there(
    found: Survey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    file = tmp_path / "evidence.json"
    file.write_text('{"card": "mine"}')
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match=r"No space left .*evidence\.json"):
        found.save(tmp_path)
    assert [one.name for one in tmp_path.iterdir()] == ["evidence.json"]
    assert file.read_text() == '{"card": "mine"}'


def test_a_survey_is_shown_in_a_console_and_a_notebook(found: Survey) -> None:
    dead = (found.frequency == 0).mean()
    assert f"of 512 features, {dead:.1%} were never active" in str(found)
    assert str(found[FEATURE]).startswith(f"feature {FEATURE}: max ")
    assert "the bridge" in found[FEATURE]._repr_html_()
    frame = found.to_pandas().set_index("feature_idx")
    assert frame.label[FEATURE] == "the bridge" and len(frame) == D_SAE
    with pytest.raises(IndexError, match=r"found 512, expected an integer in 0\.\.511"):
        found[D_SAE]
    with pytest.raises(IndexError, match=r"^feature: found 2\.5, expected an integer"):
        found[2.5]  # type: ignore[index]
    assert found[np.int64(FEATURE)] == found[FEATURE]  # type: ignore[index]


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {}, "texts: expected at least one text, found none"),
        (
            TEXTS,
            {"examples": -1},
            r"examples: found -1, expected an integer in 0\.\.50",
        ),
        (TEXTS, {"examples": True}, "examples: found True"),
        (
            TEXTS,
            {"site": "post_block.2"},
            "site: found 'post_block.2', expected .* 'post_block.1'",
        ),
        (TEXTS, {"site": "2"}, "site: found '2', expected a site of .* 'post_block.1'"),
    ],
)
def test_what_cannot_be_surveyed_is_refused_by_name(
    llm: LLM, texts: list[str], options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        survey(llm, MODULE, texts, **options)  # type: ignore[arg-type]


def test_a_bad_fit_is_a_warning() -> None:
    losses = {"ce_plain": 2.0, "ce_reconstructed": 3.0, "ce_ablated": 4.0}
    good, bad = (
        SiteEvaluation("mlp_in.1", tokens=9, fvu=fvu, l0=4.0, **losses)
        for fvu in (0.5, 14.1)
    )
    assert good.warnings == []
    (warning,) = bad.warnings
    assert warning.startswith("FVU 14.10: the SAE explains little of this site")
