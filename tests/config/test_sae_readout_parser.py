# SPDX-License-Identifier: Apache-2.0
"""`sae_readout_specs`: what is accepted, its canonical form, and every refusal."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm.config.sae_readout_specs import SAEReadoutSpec, SAEStopEntry
from vllm.config.sae_steering_parser import parse_steering_request
from vllm.config.steering import ModuleInfo, SiteInfo, SteeringConfig
from vllm.config.steering_checks import ModuleChangedError
from vllm.config.steering_points import HookPoint
from vllm.exceptions import VLLMValidationError

KEY = "sae_readout_specs"


def module(
    name: str, kind: Any = "sae", layers: tuple[int, ...] = (1, 2)
) -> ModuleInfo:
    sites = tuple(SiteInfo(at, HookPoint.POST_BLOCK, 64, 512) for at in layers)
    slots = tuple(range(len(layers)))
    return ModuleInfo(name, kind, "p", "native", name, sites, slots=slots)


CONFIG = SteeringConfig(
    {m.name: m for m in (module("a"), module("b"), module("v", "vectors"))},
    draining=frozenset({"b"}),
)


def parse(*specs: Any, config: SteeringConfig = CONFIG) -> Any:
    return parse_steering_request({KEY: list(specs)}, config)


def test_every_site_is_read_without_sites() -> None:
    request = parse({"module_name": "a", "top_k": 4})
    assert [(r.layer, r.top_k, r.features) for r in request.reads] == [
        (1, 4, ()),
        (2, 4, ()),
    ]
    assert request.digest("prefill") is None and request.digest("decode") is None


def test_structs_and_json_are_the_same_request() -> None:
    stop = SAEStopEntry(7, 1.5)
    sites = {"resid_post": [2]}
    struct = SAEReadoutSpec("a", sites=sites, features=[9, 3], stop_if=[stop])
    json = {
        "module_name": "a",
        "sites": sites,
        "features": [9, 3],
        "stop_if": [{"feature_idx": 7, "above": 1.5}],
    }
    first, second = parse(struct), parse(json)
    assert first == second
    (read,) = first.reads
    assert read.features == (3, 9) and read.explicit == (3, 7, 9)
    assert read.site == "post_block.2"


@pytest.mark.parametrize(
    ("spec", "path"),
    [
        ({"module_name": "a"}, "[0]"),
        ({"module_name": "a", "top_k": 1, "features": [1]}, "[0]"),
        ({"module_name": "a", "top_k": 0}, "[0].top_k"),
        ({"module_name": "a", "top_k": 65}, "[0].top_k"),
        ({"module_name": "a", "top_k": True}, "[0].top_k"),
        ({"module_name": "a", "top_k": 1.0}, "[0].top_k"),
        ({"module_name": "a", "features": []}, "[0].features"),
        ({"module_name": "a", "features": [512]}, "[0].features[0]"),
        ({"module_name": "a", "features": [-1]}, "[0].features[0]"),
        ({"module_name": "a", "features": [1, 1]}, "[0].features"),
        ({"module_name": "a", "features": list(range(65))}, "[0].features"),
        ({"module_name": "none", "top_k": 1}, "[0].module_name"),
        ({"module_name": "b", "top_k": 1}, "[0].module_name"),
        ({"module_name": "v", "top_k": 1}, "[0].module_name"),
        ({"module_name": "a", "top_k": 1, "sites": {}}, "[0].sites"),
        ({"module_name": "a", "top_k": 1, "sites": {"x": [1]}}, "[0].sites.x"),
        (
            {"module_name": "a", "top_k": 1, "sites": {"post_block": []}},
            "[0].sites.post_block",
        ),
        (
            {"module_name": "a", "top_k": 1, "sites": {"post_block": [3]}},
            "[0].sites.post_block[0]",
        ),
        (
            {"module_name": "a", "top_k": 1, "sites": {"post_block": [1, 1]}},
            "[0].sites.post_block[1]",
        ),
        ({"module_name": "a", "top_k": 1, "phase": "all"}, "[0].phase"),
        (
            {
                "module_name": "a",
                "top_k": 1,
                "phase": "prefill",
                "stop_if": [{"feature_idx": 1, "above": 0}],
            },
            "[0].stop_if",
        ),
        (
            {
                "module_name": "a",
                "top_k": 64,
                "stop_if": [{"feature_idx": 1, "above": 0}],
            },
            "[0].stop_if",
        ),
        (
            {
                "module_name": "a",
                "top_k": 1,
                "stop_if": [{"feature_idx": 1, "above": 1e39}],
            },
            "[0].stop_if[0].above",
        ),
        ({"module_name": "a", "top_k": 1, "n": 2}, "[0].n"),
        (3, "[0]"),
    ],
)
def test_a_refusal_names_the_field(spec: Any, path: str) -> None:
    with pytest.raises(VLLMValidationError) as caught:
        parse(spec)
    assert caught.value.parameter == KEY + path


def test_a_read_of_a_module_that_is_being_removed_can_be_tried_again() -> None:
    with pytest.raises(ModuleChangedError, match="'b' is being removed or replaced"):
        parse({"module_name": "b", "top_k": 1})


def test_a_site_is_read_once_and_a_request_reads_so_much() -> None:
    one = {"module_name": "a", "top_k": 1, "sites": {"post_block": [1]}}
    with pytest.raises(VLLMValidationError, match="twice"):
        parse(one, {"module_name": "a", "top_k": 1})
    wide = SteeringConfig({"w": module("w", layers=tuple(range(17)))})
    assert len(parse({"module_name": "w", "top_k": 60}, config=wide).reads) == 17
    with pytest.raises(VLLMValidationError, match="at most 1024"):
        parse({"module_name": "w", "top_k": 61}, config=wide)


def test_an_engine_that_reads_nothing_says_so() -> None:
    spec = {"module_name": "a", "top_k": 1}
    with pytest.raises(VLLMValidationError, match="readout=false"):
        parse(spec, config=replace(CONFIG, readout=False))
    assert parse_steering_request({KEY: []}, replace(CONFIG, readout=False)) is None
    with pytest.raises(VLLMValidationError, match="last pipeline stage"):
        parse(spec, config=replace(CONFIG, first_read_layer=2))


@pytest.mark.parametrize(
    ("asked", "path"),
    [
        ({"top_k": 65}, "[0].top_k"),
        ({"features": list(range(65))}, "[0].features"),
        ({"top_k": 64, "stop_if": [{"feature_idx": 9, "above": 0}]}, "[0].stop_if"),
    ],
)
def test_a_larger_list_needs_an_option_that_the_refusal_names(
    asked: Any, path: str
) -> None:
    spec = {"module_name": "a", **asked}
    with pytest.raises(VLLMValidationError) as caught:
        parse(spec)
    assert caught.value.parameter == KEY + path
    assert "64" in str(caught.value) and "65" in str(caught.value)
    assert "additional_config.steering.max_read_values=65" in str(caught.value)
    wider = replace(CONFIG, max_read_values=65)
    assert all(read.num_values == 65 for read in parse(spec, config=wider).reads)


def test_no_engine_reads_more_than_512_values_of_a_token_at_a_site() -> None:
    most = replace(CONFIG, max_read_values=512, max_clamps=2)
    sites = {"post_block": [1]}
    assert parse({"module_name": "a", "features": list(range(512))}, config=most).reads
    with pytest.raises(VLLMValidationError, match=r"top_k: .*1\.\.512"):
        parse({"module_name": "a", "top_k": 513}, config=most)
    stop = [{"feature_idx": 1, "above": 0}]
    spec = {"module_name": "a", "sites": sites, "top_k": 512, "stop_if": stop}
    with pytest.raises(VLLMValidationError, match="is 512, and can be 512"):
        parse(spec, config=most)


def test_all_sites_together_are_as_many_values_as_sixteen_sites() -> None:
    wide = {"w": module("w", layers=tuple(range(17)))}
    config = SteeringConfig(wide, max_read_values=512)
    assert len(parse({"module_name": "w", "top_k": 480}, config=config).reads) == 17
    with pytest.raises(VLLMValidationError, match="at most 8192"):
        parse({"module_name": "w", "top_k": 482}, config=config)


FEATURES = st.lists(st.integers(0, 511), min_size=1, max_size=20, unique=True)
STOPS = st.lists(
    st.tuples(st.integers(0, 511), st.floats(-(2.0**90), 2.0**90, width=32)),
    max_size=8,
    unique_by=lambda stop: stop[0],
)


@given(
    features=st.none() | FEATURES,
    stops=STOPS,
    layers=st.sampled_from([None, [1], [2], [2, 1]]),
    phase=st.sampled_from(["both", "decode"]),
)
def test_the_canonical_form_parses_to_itself(
    features: Any, stops: Any, layers: Any, phase: str
) -> None:
    spec = {
        "module_name": "a",
        "sites": None if layers is None else {"post_block": layers},
        "top_k": 5 if features is None else None,
        "features": features,
        "phase": phase,
        "stop_if": [{"feature_idx": f, "above": v} for f, v in stops] or None,
    }
    request = parse(spec)
    again = parse_steering_request(request.to_extra_args(), CONFIG)
    assert again.reads == request.reads
