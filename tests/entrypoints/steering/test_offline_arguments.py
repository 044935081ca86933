# SPDX-License-Identifier: Apache-2.0
"""What a notebook may pass by mistake: refused by name, or taken for what is meant."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from steering_testing.golden_gate import BRIDGE, MODULE, example_engine

from vllm import LLM
from vllm.entrypoints.steering import encode, evaluate, find_features
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
    ("encode", "a", {"module": "none"}, "^module_name: found 'none'.*'golden-gate'"),
    (
        "encode",
        "a",
        {"top_k": 65},
        "^top_k: found 65, expected an integer in 1..64: start",
    ),
    ("encode", 5, {}, "texts: found 5, expected a text or a list"),
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
    call: Any = {"encode": encode, "find": find_features, "evaluate": evaluate}[name]
    options = dict(options)
    module = options.pop("module", MODULE)
    with pytest.raises((ValueError, VLLMValidationError), match=message):
        call(llm, module, texts, **options)
    assert not llm.llm_engine.has_unfinished_requests()
