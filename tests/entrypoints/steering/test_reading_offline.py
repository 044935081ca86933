# SPDX-License-Identifier: Apache-2.0
"""The library on the demo model: encode, find features, evaluate."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from steering_testing.engine import TRACED
from steering_testing.golden_gate import BRIDGE, EXAMPLE, MODULE, example_engine

from vllm import LLM, SamplingParams
from vllm.entrypoints.cli.steering.fit import measure
from vllm.entrypoints.steering import (
    delete_preset,
    encode,
    evaluate,
    find_features,
    put_preset,
    set_default_preset,
)
from vllm.entrypoints.steering.encoded import entries
from vllm.entrypoints.steering.evaluate import SiteEvaluation, TooShortError
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.layers.steering_state import SAESlot
from vllm.model_executor.layers.steering_stream import Stream

FEATURE = BRIDGE["feature"]
SITE = "post_block.1"
ABOUT = [
    "the golden gate bridge in the fog .",
    "we walk over the bridge in the fog .",
    "the bridge spans the bay .",
]
OTHERS = [
    "the chef stirs the tomato soup .",
    "the farmer feeds the cows .",
    "xylophone quark zyzzyva the doctor reads a book .",
]


@pytest.fixture(scope="module")
def of_compiled() -> SiteEvaluation:
    """What a compiled engine measures."""
    with example_engine(**TRACED) as llm:
        (found,) = evaluate(llm, MODULE, ABOUT)
    return found


# After the compiled engine: two at once would share their process groups.
@pytest.fixture(scope="module")
def llm(
    tmp_path_factory: pytest.TempPathFactory, of_compiled: SiteEvaluation
) -> Iterator[LLM]:
    sae = tmp_path_factory.mktemp("labelled") / "sae"
    shutil.copytree(EXAMPLE / "sae", sae)
    (sae / "labels.json").write_text(json.dumps({str(FEATURE): "from beside"}))
    with example_engine(sae) as llm:
        yield llm


def test_encode_gives_every_token_its_features(llm: LLM) -> None:
    first, second = encode(llm, MODULE, ABOUT[:2], top_k=4)
    assert "the golden gate bridge" in "".join(first.tokens)
    for found in (first, second):
        record = found.site()
        assert record.positions.tolist() == list(range(1, len(found.tokens)))
    (exact,) = encode(llm, MODULE, ABOUT[0], features=list(range(150)))
    assert exact.site(SITE).features.shape[1] == 150
    dense = exact.site().to_dense()[:, :150]
    listed = first.site().to_dense()[:, :150]
    np.testing.assert_allclose(listed[listed != 0], dense[listed != 0], rtol=1e-4)
    assert exact.site("blocks.1.hook_resid_post") is exact.site("resid_post.1")
    with pytest.raises(KeyError, match=r"site: found 'post_block\.7', expected one of"):
        exact.site("post_block.7")


def test_encode_reads_what_a_steered_model_sees(llm: LLM) -> None:
    clamp = {"feature_idx": FEATURE, "kind": "additive", "value": 5.0}
    steering = {"sae_clamp_specs": [{"module_name": MODULE, "clamps": [clamp]}]}
    (plain,) = encode(llm, MODULE, OTHERS[0], features=[FEATURE])
    (steered,) = encode(llm, MODULE, OTHERS[0], features=[FEATURE], steering=steering)
    gain = steered.activations(FEATURE) - plain.activations(FEATURE)
    assert (gain[1:] > 1.0).all()


def test_an_encoded_text_is_shown_in_a_notebook(llm: LLM) -> None:
    texts = encode(llm, MODULE, [ABOUT[0]], labels={FEATURE: "bridge & <bay>"})
    page = texts._repr_html_()
    assert page.count("<span") == len(texts[0].tokens)
    assert "bridge &amp; &lt;bay&gt;" in page
    assert "<bos>" not in page
    assert texts[0].to_html(FEATURE).count("<span") == len(texts[0].tokens)


def test_labels_beside_the_module_are_shown(llm: LLM) -> None:
    (text,) = encode(llm, MODULE, ABOUT[0], features=[FEATURE])
    assert text.labels == {FEATURE: "from beside"} and "from beside" in text.to_html()
    assert encode(llm, MODULE, ABOUT[0], labels={})[0].labels == {}
    found = find_features(llm, MODULE, ABOUT, OTHERS, top=200)
    shown = {one.feature_idx: one.label for one in found}
    assert shown.pop(FEATURE) == "from beside" and set(shown.values()) == {""}
    assert "from beside" in found._repr_html_()


def test_results_are_data_frames(llm: LLM) -> None:
    pytest.importorskip("pandas")
    texts = encode(llm, MODULE, ABOUT[:2], top_k=3, labels={FEATURE: "bridge"})
    frame = texts.to_pandas()
    assert set(frame.text) == {0, 1} and set(frame.site) == {SITE}
    listed = [
        (text, one.tokens[position], feature, value)
        for text, one in enumerate(texts)
        for position, feature, value in entries(one.site())
    ]
    columns = (frame.text, frame.token, frame.feature_idx, frame.value)
    assert list(zip(*columns, strict=True)) == listed
    assert set(frame.label[frame.feature_idx == FEATURE]) <= {"bridge"}
    assert encode(llm, MODULE, []).to_pandas().empty
    found = find_features(llm, MODULE, ABOUT, OTHERS, labels={FEATURE: "bridge"})
    frame = found.to_pandas()
    assert frame.feature_idx.tolist() == [one.feature_idx for one in found]
    assert frame.auroc.is_monotonic_decreasing
    assert frame.label[frame.feature_idx == FEATURE].tolist() == ["bridge"]
    evaluation = evaluate(llm, MODULE, ABOUT)
    (row,) = evaluation.to_pandas().to_dict("records")
    assert row["site"] == SITE and row["recovered"] == evaluation[0].recovered


def test_without_pandas_the_error_says_what_to_install(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = (
        encode(llm, MODULE, ABOUT),
        find_features(llm, MODULE, ABOUT, OTHERS),
        evaluate(llm, MODULE, ABOUT[:1]),
    )
    monkeypatch.setitem(sys.modules, "pandas", None)
    for result in (*results, results[0][0]):
        with pytest.raises(ImportError, match="pip install pandas"):
            result.to_pandas()


def test_results_are_short_in_a_console(llm: LLM) -> None:
    first, long = encode(llm, MODULE, [ABOUT[0], ABOUT[1] * 5], top_k=4)
    shown = repr("".join(first.tokens))
    assert repr(first) == f"EncodedText({shown}, {len(first.tokens)} tokens, {SITE})"
    assert len(repr(long)) < 120 and "..." in repr(long)
    record = first.site()
    of = f"4 of {record.d_sae} features"
    assert repr(record) == f"SAEFeatures({len(record)} tokens, {of})"
    assert first != long and record != long.site()
    found = find_features(llm, MODULE, ABOUT, OTHERS, labels={FEATURE: "bridge"})
    best = [one.feature_idx for one in found][:5]
    listed = ", ".join(map(str, best))
    assert repr(found) == f"FoundFeatures({SITE}, 20 features: {listed}, ...)"
    head, titles, row, *_ = lines = str(found).splitlines()
    assert head == f"{SITE}: 20 features, the best first"
    assert titles.split()[:5] == ["feature", "A", "-", "B", "AUROC"]
    assert row.split()[0] == str(best[0]) and row.split()[2] == "1.000"
    (line,) = (one for one in lines if one.split()[0] == str(FEATURE))
    assert line.endswith("  bridge")


def test_token_ids_and_labels_may_come_from_other_libraries(llm: LLM) -> None:
    (text,) = encode(llm, MODULE, ABOUT[0], features=[FEATURE])
    ids = text.token_ids
    labels: Any = {str(FEATURE): "bridge"}  # as `json.loads` gives them
    for given in (np.array(ids), [np.array(ids)], torch.tensor(ids), tuple(ids)):
        features: Any = np.array([FEATURE])
        (found,) = encode(llm, MODULE, given, features=features, labels=labels)
        assert found.token_ids == ids and found.labels == {FEATURE: "bridge"}
        np.testing.assert_array_equal(found.site().values, text.site().values)


def test_a_text_of_which_no_token_is_read(llm: LLM) -> None:
    bos = llm.get_tokenizer().bos_token_id
    (text,) = encode(llm, MODULE, [[bos]])
    assert text.features == {} and text.activations(FEATURE).tolist() == [0.0]
    assert "no token was read" in repr(text) and text.to_html().count("<span") == 1
    with pytest.raises(KeyError, match="the module skips all"):
        text.site()
    assert text.to_pandas().empty
    with pytest.raises(ValueError, match="every token was left unchanged"):
        find_features(llm, MODULE, [[bos]])


def test_one_token_has_no_variance_to_explain(llm: LLM) -> None:
    bos = llm.get_tokenizer().bos_token_id
    with pytest.raises(
        TooShortError, match="texts: expected at least two tokens .*found 1$"
    ):
        evaluate(llm, MODULE, [[bos, 5]])


def test_the_default_preset_of_the_engine_does_not_steer_what_is_read(
    llm: LLM,
) -> None:
    clamp = {"feature_idx": FEATURE, "kind": "additive", "value": 5.0}
    specs = {"sae_clamp_specs": [{"module_name": MODULE, "clamps": [clamp]}]}
    (plain,) = encode(llm, MODULE, OTHERS[0], features=[FEATURE])
    (fit,) = evaluate(llm, MODULE, OTHERS)
    try:
        put_preset(llm, "bridge", specs)
        set_default_preset(llm, "bridge")
        (text,) = encode(llm, MODULE, OTHERS[0], features=[FEATURE])
        np.testing.assert_array_equal(text.site().values, plain.site().values)
        assert evaluate(llm, MODULE, OTHERS) == [fit]
        asked = {"steering_preset": "bridge"}
        (text,) = encode(llm, MODULE, OTHERS[0], features=[FEATURE], steering=asked)
        assert (text.activations(FEATURE)[1:] > plain.activations(FEATURE)[1:]).all()
        # A locked one acts on every request.
        put_preset(llm, "bridge", {**specs, "locked": True})
        (locked,) = encode(llm, MODULE, OTHERS[0], features=[FEATURE])
        np.testing.assert_array_equal(locked.site().values, text.site().values)
        with pytest.raises(VLLMValidationError, match="locked"):
            evaluate(llm, MODULE, OTHERS)
    finally:
        set_default_preset(llm, None)
        delete_preset(llm, "bridge")


def test_a_record_is_a_sparse_matrix(llm: LLM) -> None:
    pytest.importorskip("scipy")
    record = encode(llm, MODULE, ABOUT[0], top_k=4)[0].site()
    matrix = record.to_scipy()
    assert matrix.shape == (len(record), record.d_sae)
    assert matrix.nnz == record.counts.sum()
    np.testing.assert_array_equal(matrix.toarray(), record.to_dense())


def test_tokens_are_shaded_by_their_activation(llm: LLM) -> None:
    labels = {FEATURE: "bridge"}
    (text,) = encode(llm, MODULE, ABOUT[0], features=[FEATURE], labels=labels)
    values = text.activations(FEATURE)
    alphas = re.findall(r"rgba\(255,140,0,([0-9.]+)\)", text.to_html(FEATURE))
    shades = np.array([float(alpha) for alpha in alphas])
    np.testing.assert_allclose(shades, values / values.max(), atol=0.006)
    strongest = int(values.argmax())
    titles = re.findall(r'title="([^"]*)"', text.to_html(FEATURE))
    assert titles[strongest] == f"{FEATURE}: {values.max():.2f} bridge"
    assert titles[0] == ""  # The module leaves bos alone.


def test_the_bridge_feature_is_among_the_best(llm: LLM) -> None:
    found = find_features(llm, MODULE, ABOUT, OTHERS, labels={FEATURE: "bridge"})
    assert FEATURE in [one.feature_idx for one in found][:3]
    best = next(one for one in found if one.feature_idx == FEATURE)
    assert best.label == "bridge"
    assert best.auroc == 1.0 and best.mean_difference > 0
    assert best.frequency > best.frequency_against
    assert best.examples[0].value == pytest.approx(best.max_activation)
    assert found.site == SITE and len(found) <= 20
    scores = [one.auroc for one in found]
    assert scores == sorted(scores, reverse=True)
    assert "bridge" in found._repr_html_()
    assert any("<unk>" in line for line in found.warnings)
    alone = find_features(llm, MODULE, ABOUT, top=200, site=SITE)
    assert FEATURE in [one.feature_idx for one in alone]
    assert alone[0].auroc is None
    json.dumps(found.to_json())


def test_evaluate_measures_fit_and_loss(llm: LLM) -> None:
    texts = [*ABOUT, *OTHERS]
    evaluation = evaluate(llm, MODULE, texts)
    (found,) = evaluation
    encoded = encode(llm, MODULE, texts, top_k=1)
    active = np.concatenate([one.site().num_active for one in encoded])
    assert found.site == SITE
    assert found.tokens == len(active)
    assert found.l0 == pytest.approx(active.mean())
    assert 0 < found.fvu < 1
    assert found.ce_plain < found.ce_reconstructed < found.ce_ablated
    assert 0 < found.recovered < 1
    assert found.median_norm > 0
    assert found.large == 0 and found.warnings == []
    assert "FVU" in evaluation._repr_html_()
    # Nothing of the measurement is left behind: the same text, untouched.
    params = SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=0)
    losses = []
    for output in llm.generate(texts, params, use_tqdm=False):
        ids = output.prompt_token_ids[1:]
        scores = zip(ids, output.prompt_logprobs[1:], strict=True)
        losses += [-step[token].logprob for token, step in scores]
    assert np.mean(losses) == pytest.approx(found.ce_plain, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("use_v2", ["0", "1"])
def test_no_graph_is_replayed_while_a_site_is_measured(use_v2: str) -> None:
    from vllm.v1.worker.steering_model_runner_mixin import (
        SteeringModelRunnerV1Mixin,
        SteeringModelRunnerV2Mixin,
    )

    graphs = SimpleNamespace(keys_initialized=True, _graphs_captured=True)
    if use_v2 == "1":
        runner: Any = SteeringModelRunnerV2Mixin()
        runner.cudagraph_manager = graphs
    else:
        runner = SteeringModelRunnerV1Mixin()
        runner.cudagraph_dispatcher = graphs
    name = "_graphs_captured" if use_v2 == "1" else "keys_initialized"
    for used in (False, False, True, True):
        runner.use_steering_graphs(used)
        assert vars(graphs)[name] is used
    vars(graphs)[name] = False  # An eager engine.
    for used in (False, True):
        runner.use_steering_graphs(used)
        assert vars(graphs)[name] is False


def test_fvu_is_that_of_the_probe(llm: LLM) -> None:
    core = llm.llm_engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    (site,) = runner.steering.modules.sites.values()
    streams: list[torch.Tensor] = []
    stock = site.backend.full_reconstruction

    def record(slot: SAESlot, stream: Stream) -> None:
        assert stream.residual is not None
        streams.append(stream.hidden + stream.residual)
        stock(slot, stream)

    site.backend.full_reconstruction = record
    try:
        (text,) = encode(llm, MODULE, ABOUT[0], top_k=1)
    finally:
        del site.backend.full_reconstruction
    x = streams[0][1 : len(text.tokens)]
    (found,) = evaluate(llm, MODULE, [ABOUT[0]])
    assert found.fvu == pytest.approx(measure(site.saes[0].weights, x).fvu, rel=1e-3)


def test_a_compiled_engine_is_evaluated_like_an_eager_one(
    llm: LLM, of_compiled: SiteEvaluation
) -> None:
    (eager,) = evaluate(llm, MODULE, ABOUT)
    found = of_compiled
    assert found.tokens == eager.tokens
    for name in ("fvu", "l0", "ce_plain", "ce_reconstructed", "ce_ablated"):
        assert getattr(found, name) == pytest.approx(getattr(eager, name), rel=1e-4)
