# SPDX-License-Identifier: Apache-2.0
"""What a notebook may pass by mistake: refused by name, or taken for what is meant."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from steering_testing.golden_gate import BRIDGE, MODULE, example_engine
from transformers import BatchEncoding

from vllm import LLM
from vllm.config.sae_steering_types import SAEReadoutSpec, SteeringSamplingParams
from vllm.entrypoints.steering import (
    encode,
    evaluate,
    find_features,
    list_modules,
    survey,
)
from vllm.exceptions import VLLMValidationError

FEATURE = BRIDGE["feature"]
SITE = "post_block.1"
ABOUT = ["the golden gate bridge in the fog .", "the bridge spans the bay ."]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with example_engine() as llm:
        yield llm


@pytest.mark.parametrize(
    "sites",
    [SITE, ("post_block", 1), [SITE], [("resid_post", 1)], {"post_block": (1,)}],
)
def test_a_site_may_be_named_in_every_form(llm: LLM, sites: Any) -> None:
    (text,) = encode(llm, MODULE, ABOUT[0], sites=sites, features=[FEATURE])
    (every,) = encode(llm, MODULE, ABOUT[0], features=[FEATURE])
    assert list(text.features) == [SITE]
    np.testing.assert_array_equal(text.site().values, every.site().values)


CHAT = [{"role": "user", "content": "Who are you?"}]
CALLS = {
    "encode": encode,
    "find": find_features,
    "survey": survey,
    "evaluate": evaluate,
}
REFUSED: list[tuple[str, Any, dict[str, Any], str]] = [
    ("encode", "a", {"top_k": 2, "features": [1]}, "top_k: found both"),
    ("encode", "a", {"features": []}, "features: found none"),
    ("encode", "a", {"features": [1 << 30]}, r"features\[0\]: found"),
    ("encode", "a", {"features": [*range(99), 999]}, r"features\[99\]: found 999"),
    ("encode", "a", {"sites": "post_blok.1"}, r"^sites\[0\]: found 'post_blok.1', exp"),
    ("encode", "a", {"sites": 1}, "^sites: found 1, expected null, a list of sites"),
    ("encode", "a", {"sites": [1]}, r"^sites\[0\]: found 1, expected a site"),
    ("encode", "a", {"sites": ["post_block.9"]}, "layer 9 at post_block, expected one"),
    ("encode", "a", {"sites": {"resid": [1]}}, "expected one of pre_attn, post_attn"),
    ("encode", "a", {"sites": {"post_block": 1}}, "sites.post_block: found 1"),
    ("encode", "a", {"sites": {"post_block": [3]}}, "layer 3"),
    ("encode", ["a", 5], {}, r"texts\[1\]: found 5, expected"),
    ("encode", ["a", [1.5]], {}, r"texts\[1\]: found a list, expected"),
    ("encode", ["a", []], {}, r"texts\[1\]: found 0 tokens, expected 1 to 255"),
    ("encode", ["a", [5] * 256], {}, r"texts\[1\]: found 256 tokens"),
    ("encode", "a", {"module": "none"}, "^module: found 'none'.*'golden-gate'"),
    ("encode", "a", {"module": ["a"]}, "^module: found a list, .* 'golden-gate'"),
    ("find", ABOUT, {"module": None}, "^module: found None, .*'golden-gate'"),
    ("survey", ABOUT, {"module": "none"}, "^module: found 'none'.*'golden-gate'"),
    ("evaluate", ABOUT, {"module": ["a"]}, "^module: found a list.*'golden-gate'"),
    (
        "encode",
        "a",
        {"features": 457},
        r"^features: found 457, .*enclose it in \[...\]",
    ),
    ("encode", "a", {"features": np.int64(457)}, "^features: found a int64 .*enclose"),
    ("encode", "a", {"features": torch.tensor(457.0)}, "^features: found a Tensor"),
    ("encode", "a", {"features": "457"}, "^features: found '457', expected a list"),
    ("encode", "a", {"features": [457.0]}, r"^features\[0\]: found 457.0, expected"),
    ("encode", "a", {"features": np.array([4.0])}, r"^features\[0\]: found a float64"),
    ("encode", "a", {"features": [-1]}, r"^features\[0\]: found -1, expected a feat"),
    ("encode", "a", {"features": [True]}, r"^features\[0\]: found True, expected"),
    *(
        (call, texts, {}, f"^texts: found {found}")
        for call in ("encode", "find", "survey", "evaluate")
        for texts, found in (
            ({"text": ABOUT}, "an object, expected a text, .* such as its 'text'"),
            (
                BatchEncoding({"input_ids": [5], "attention_mask": [1]}),
                "a value of type BatchEncoding, .* such as its 'input_ids'",
            ),
            (b"the bridge", "b'the bridge', expected a text"),
            (iter(ABOUT), "a value of type list_iterator, expected a text"),
            (SimpleNamespace(columns=[]), "a value of type .*one of its columns"),
        )
    ),
    ("encode", CHAT, {}, r"^texts\[0\]: found an object, .*apply_chat_template"),
    ("survey", [CHAT], {}, r"^texts\[0\]: found a list, .*apply_chat_template"),
    ("evaluate", [b"a"], {}, r"^texts\[0\]: found b'a', expected a string or a list"),
    ("encode", [5, 10**7], {}, r"^texts\[0\]: found the token 10000000, .* in 0\.\."),
    ("encode", ["a", [-1]], {}, r"^texts\[1\]: found the token -1, expected token"),
    ("find", ABOUT, {"against": [5.5]}, r"^against\[0\]: found 5.5, expected a string"),
    ("find", None, {}, "^texts: found None, expected a text"),
    ("encode", "a", {"labels": ["a"]}, "^labels: found a list, .* by feature index"),
    ("encode", "a", {"labels": {457: 5}}, "^labels.457: found 5, expected a text"),
    ("encode", "a", {"steering": [1]}, "^steering: found a list, .*sae_clamp_specs"),
    ("encode", "a", {"steering": {"top_p": 1}}, "^steering: .*'top_p', expected only"),
    ("encode", "a", {"steering": {"sae_readout_specs": []}}, "^steering: found the f"),
    (
        "encode",
        "a",
        {"top_k": 65},
        "^top_k: found 65, expected an integer in 1..64: start",
    ),
    ("encode", 5, {}, "texts: found 5, expected a text, token ids, or a list"),
    ("encode", None, {}, "texts: found None"),
    ("encode", "a", {"labels": {"x": "y"}}, "labels: found 'x', expected a feature"),
    ("encode", "a", {"steering": {"sae_clamp_specs": 3}}, "sae_clamp_specs: found 3"),
    ("find", [], {}, "texts: expected at least one text"),
    ("find", ABOUT, {"top": True}, "top: found True, expected an integer in 1..256"),
    ("find", ABOUT, {"top": 257}, "top: found 257"),
    ("find", ABOUT, {"top": "a"}, "top: found .a., expected an integer in 1..256"),
    ("find", ABOUT, {"site": "post"}, "site: found 'post', expected a site"),
    ("find", ABOUT, {"site": ("x", 1)}, "site: found 'x.1', expected a site"),
    ("find", ABOUT, {"site": "post_block.3"}, "expected a site of module"),
    ("evaluate", [[5] * 300], {}, r"texts\[0\]: found 300 tokens"),
    ("evaluate", ABOUT, {"module": "none"}, "module: found 'none'.*golden-gate"),
    ("evaluate", [[5]], {}, "texts: expected at least one text of two"),
]


@pytest.mark.parametrize(("name", "texts", "options", "message"), REFUSED)
def test_what_cannot_be_asked_is_refused_by_name(
    llm: LLM, name: str, texts: Any, options: dict[str, Any], message: str
) -> None:
    call: Any = CALLS[name]
    options = dict(options)
    module = options.pop("module", MODULE)
    with pytest.raises((ValueError, VLLMValidationError), match=message):
        call(llm, module, texts, **options)
    assert not llm.llm_engine.has_unfinished_requests()


def test_texts_may_come_from_other_libraries(llm: LLM) -> None:
    want = [text.token_ids for text in encode(llm, MODULE, ABOUT)]
    pandas = pytest.importorskip("pandas")
    first = torch.tensor([want[0]])
    for given, ids in (
        (np.array(ABOUT), want),
        (pandas.Series(ABOUT, index=[7, 8]), want),
        (tuple(ABOUT), want),
        (first, want[:1]),
        (first.numpy(), want[:1]),
        ({text: None for text in ABOUT}.keys(), want),
    ):
        found = encode(llm, MODULE, given)
        assert [text.token_ids for text in found] == ids, given
    against: Any = np.array(["the chef stirs the tomato soup ."])
    assert len(find_features(llm, MODULE, ABOUT, against, top=np.int64(2))) == 2
    assert survey(llm, MODULE, ABOUT, examples=np.int64(0)).examples == {}


@pytest.mark.parametrize(
    "features", [np.array([3, 457]), torch.tensor([3, 457]), range(2, 5), (3, 457)]
)
def test_a_read_takes_the_features_of_other_libraries(llm: LLM, features: Any) -> None:
    spec = SAEReadoutSpec(MODULE, features=features, phase="prefill")
    params = SteeringSamplingParams(max_tokens=1, sae_readout_specs=[spec])
    (output,) = llm.generate(ABOUT[:1], params, use_tqdm=False)
    record = output.prompt_sae_features[MODULE][SITE]
    assert record.features[0].tolist() == [int(feature) for feature in features]
    spec = SAEReadoutSpec(MODULE, features=np.array([3.0]))
    params = SteeringSamplingParams(max_tokens=1, sae_readout_specs=[spec])
    with pytest.raises(
        VLLMValidationError, match=r"features\[0\]: found 3.0, expected"
    ):
        llm.generate(ABOUT[:1], params, use_tqdm=False)


def test_what_was_not_read_is_not_zero(llm: LLM) -> None:
    (text,) = encode(llm, MODULE, ABOUT[0], features=np.array([3, FEATURE]))
    scalars: list[Any] = [np.int64(FEATURE), np.array(FEATURE), torch.tensor(FEATURE)]
    for feature in (FEATURE, *scalars):
        assert text.activations(feature).max() > 0
    bad: list[tuple[Any, str]] = [
        (7, f"found 7, which was not read, expected one of 3, {FEATURE}"),
        (True, "found True, expected an integer in"),
        (np.array([FEATURE]), r"found a ndarray \[1\] of int64, expected an integer"),
    ]
    for feature, message in bad:
        with pytest.raises(ValueError, match=f"^feature: {message}"):
            text.activations(feature)
    (listed,) = encode(llm, MODULE, ABOUT[0], top_k=2)
    assert not listed.activations(7).any()


def test_a_record_goes_by_every_name_of_its_site(llm: LLM) -> None:
    (text,) = encode(llm, MODULE, ABOUT[0], top_k=2)
    for name in (SITE, ("post_block", 1), "blocks.1.hook_resid_post", None):
        assert text.site(name) is text.features[SITE]
        assert len(text.activations(FEATURE, name)) == len(text.tokens)
    for bad in (1, "post_blok.1", ("post_block", "x")):
        with pytest.raises(KeyError, match=f"site: found .*, expected one of '{SITE}'"):
            text.site(bad)  # type: ignore[arg-type]


def test_a_place_is_no_feature(llm: LLM) -> None:
    found = find_features(llm, MODULE, ABOUT, top=2)
    assert found[-1] is found.features[1]
    with pytest.raises(IndexError, match=f"found {FEATURE}, expected a place in 0..1"):
        found[FEATURE]


def test_an_engine_comes_first() -> None:
    with pytest.raises(
        ValueError, match="^llm: found 'golden-gate', expected a vllm.L"
    ):
        list_modules(MODULE)  # type: ignore[arg-type]
