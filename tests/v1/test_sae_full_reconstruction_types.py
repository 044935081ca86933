# SPDX-License-Identifier: Apache-2.0
"""Request types: what is accepted survives every codec, what is wrong is refused."""

from __future__ import annotations

import copy
import dataclasses
import json
import time
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from steering_testing.specs import (
    ADDITIVE,
    CONFIG,
    D_SAE,
    DELTA,
    FULL,
    POST,
    config,
    entry,
    fast,
    one,
    parse,
    requests,
)

from vllm import SamplingParams
from vllm.config.sae_steering_types import (
    SAEClampEntry,
    SAEClampSpec,
    SAEFullReconstructionSpec,
    SteeringSamplingParams,
    SteeringVectorSpec,
)
from vllm.config.steering import SiteInfo, Tier
from vllm.config.steering_kept import MAX_KEPT_BYTES, MAX_KEY_BYTES, KeptParses
from vllm.config.steering_points import HookPoint
from vllm.exceptions import VLLMValidationError
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

BIG = SiteInfo(3, POST, 8, 4096)


@fast
@given(requests())
def test_an_accepted_request_survives_json(extra_args: dict[str, Any]) -> None:
    request = parse(extra_args)
    again = parse(json.loads(json.dumps(request.to_extra_args())))
    assert again == request
    assert again.to_extra_args() == request.to_extra_args()


@fast
@given(requests())
def test_an_accepted_request_survives_the_msgpack_codec(extra_args: Any) -> None:
    params = SteeringSamplingParams(**extra_args)
    frames = MsgpackEncoder().encode(params)
    decoded = MsgpackDecoder(SamplingParams).decode(frames)
    assert type(decoded) is SamplingParams
    assert parse(decoded.extra_args) == parse(extra_args)


def test_dataclasses_survive_the_msgpack_codec_as_they_are() -> None:
    spec = SAEFullReconstructionSpec(
        "wide", {"post_block": {1: [SAEClampEntry(3, "scale", 2.0)]}}, "decode"
    )
    params = SteeringSamplingParams(sae_full_reconstruction_specs=[spec])
    decoded = MsgpackDecoder(SamplingParams).decode(MsgpackEncoder().encode(params))
    assert parse(decoded.extra_args) == parse({FULL: [spec]})


def test_int_and_string_layer_keys_are_one_request() -> None:
    by_int = {
        DELTA: [{"module_name": "wide", "clamps": {"post_block": {1: [entry()]}}}]
    }
    by_str = {
        DELTA: [{"module_name": "wide", "clamps": {"resid_post": {"1": [entry()]}}}]
    }
    assert parse(by_int) == parse(by_str)


def test_dataclasses_and_dicts_are_one_request() -> None:
    as_dict = {ADDITIVE: [{"module_name": "v1", "scale": 2}]}
    assert parse({ADDITIVE: [SteeringVectorSpec("v1", 2.0)]}) == parse(as_dict)


def test_no_clamps_means_every_site_reconstructed() -> None:
    listed = {h: {"1": [], "2": []} for h in ("post_block", "pre_attn")}
    explicit = {FULL: [{"module_name": "wide", "clamps": listed}]}
    assert parse({FULL: [{"module_name": "wide"}]}) == parse(explicit)


def test_listed_sites_are_the_only_ones_reconstructed() -> None:
    specs = {FULL: [{"module_name": "wide", "clamps": {"post_block": {2: []}}}]}
    (edit,) = parse(specs).edits(Tier.FULL, "decode")
    assert (edit.layer, edit.hook, edit.clamps) == (2, POST, ())


def test_a_vector_named_twice_adds_its_scales() -> None:
    specs = [SteeringVectorSpec("v1", 2.0), SteeringVectorSpec("v1", 0.5, "prefill")]
    request = parse({ADDITIVE: specs})
    assert request.edits(Tier.ADDITIVE, "prefill")[0].clamps[0].value == 2.5
    assert request.edits(Tier.ADDITIVE, "decode")[0].clamps[0].value == 2.0


def test_equal_edits_share_a_row_key_across_requests_and_phases() -> None:
    both, decode = parse(one(FULL)), parse(one(FULL, phase="decode"))
    key = both.row_key(Tier.FULL, "prefill")
    assert key is not None
    assert key == decode.row_key(Tier.FULL, "decode")
    assert decode.row_key(Tier.FULL, "prefill") is None
    assert both.row_key(Tier.DELTA, "prefill") is None


@pytest.mark.parametrize("nothing", [None, {}, {FULL: None}, {FULL: []}, {"else": 1}])
def test_nothing_asked_is_no_request(nothing: Any) -> None:
    assert parse(nothing, None) is None


def test_the_reserved_feature_range_is_all_of_d_sae() -> None:
    for feature in (0, D_SAE - 1):
        assert parse(one(DELTA, clamps=[entry(feature)])) is not None


def test_the_same_json_is_parsed_once() -> None:
    def asked() -> dict[str, Any]:
        specs = [{"module_name": "one", "clamps": {"post_block": {"3": [entry(2)]}}}]
        return {FULL: specs, "other_key": object()}

    assert parse(asked()) is parse(asked())
    # An equal configuration may hold other weights by the time that it is another.
    again = config(*CONFIG.modules.values())
    assert parse(asked(), again) == parse(asked())
    assert parse(asked(), again) is not parse(asked())


def test_a_request_of_many_clamps_is_parsed_once() -> None:
    wide = config(dataclasses.replace(CONFIG.modules["one"], sites=(BIG,)))
    wide = dataclasses.replace(wide, max_clamps=2000)
    specs = [
        {
            "module_name": "one",
            "clamps": {"post_block": {"3": [entry(f) for f in range(2000)]}},
        }
    ]
    assert parse({FULL: specs}, wide) is parse({FULL: specs}, wide)


def test_what_is_kept_has_a_limit_in_bytes() -> None:
    kept = KeptParses()
    kept.keep(bytes(MAX_KEY_BYTES + 1), "too long")
    assert not len(kept)
    fit = MAX_KEPT_BYTES // MAX_KEY_BYTES
    keys = [bytes([i]) * MAX_KEY_BYTES for i in range(fit + 1)]
    for i, key in enumerate(keys):
        kept.keep(key, i)
    assert [kept.get(key) for key in keys] == [None, *range(1, fit + 1)]


def test_a_field_that_is_set_later_replaces_the_key() -> None:
    params = SteeringSamplingParams(sae_clamp_specs=["old"], steering_preset="calm")
    params.sae_clamp_specs = ["new"]
    params.temperature = 0.5
    params.steering_preset = None
    assert params.extra_args == {"sae_clamp_specs": ["new"], "steering_preset": None}
    copied = params.clone()
    copied.sae_clamp_specs = None
    assert copied.extra_args == {"steering_preset": None}
    assert copied.temperature == 0.5
    assert params.extra_args["sae_clamp_specs"] == ["new"]
    plain = SteeringSamplingParams()
    plain.sae_readout_specs = ["read"]
    assert plain.extra_args == {"sae_readout_specs": ["read"]}
    with pytest.raises(VLLMValidationError, match="sae_clamp_spec: .*sae_clamp_specs"):
        plain.sae_clamp_spec = ["new"]


def test_sampling_params_fold_the_fields_into_extra_args() -> None:
    params = SteeringSamplingParams(
        temperature=0.0,
        extra_args={"mine": 1},
        sae_clamp_specs=[SAEClampSpec("one", [])],
    )
    assert set(params.extra_args) == {"mine", DELTA}
    assert params.sae_clamp_specs is None


def test_sampling_params_without_specs_are_stock_ones() -> None:
    frames = MsgpackEncoder().encode(SteeringSamplingParams(max_tokens=3))
    assert frames == MsgpackEncoder().encode(SamplingParams(max_tokens=3))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, SamplingParams.clone])
def test_copies_of_sampling_params_keep_the_specs(copied: Any) -> None:
    params = SteeringSamplingParams(n=3, **one(FULL))
    assert parse(copied(params).extra_args) == parse(one(FULL))


def test_a_spec_given_in_both_places_is_refused() -> None:
    with pytest.raises(VLLMValidationError, match=DELTA):
        SteeringSamplingParams(extra_args=one(DELTA), sae_clamp_specs=[])


@pytest.mark.parametrize(
    "scalar",
    [np.int64, np.uint8, np.array, torch.tensor, lambda i: torch.arange(9)[i]],
    ids=["int64", "uint8", "0-d array", "0-d tensor", "argmax"],
)
def test_integers_of_numpy_and_torch_are_integers(scalar: Any) -> None:
    spec = SAEClampSpec("one", [SAEClampEntry(scalar(3), "scale", 2.0)])
    assert parse({DELTA: [spec]}) == parse(one(DELTA, clamps=[entry(3, "scale", 2.0)]))


@pytest.mark.parametrize("scalar", [np.float32, np.float64, np.int8, torch.tensor])
def test_numbers_of_numpy_and_torch_are_numbers(scalar: Any) -> None:
    given = one(DELTA, clamps=[entry(3, "scale", scalar(2))])
    assert parse(given) == parse(one(DELTA, clamps=[entry(3, "scale", 2.0)]))


def test_a_layer_of_numpy_is_a_layer() -> None:
    by_numpy = {np.arange(3)[1]: [entry()]}
    specs = [{"module_name": "wide", "clamps": {HookPoint.POST_BLOCK: by_numpy}}]
    same = [{"module_name": "wide", "clamps": {"post_block": {"1": [entry()]}}}]
    assert parse({DELTA: specs}) == parse({DELTA: same})


def test_the_largest_request_is_read_in_milliseconds() -> None:
    """The server's event loop waits for it (a limit far above what is measured)."""
    sites = tuple(SiteInfo(layer, POST, 8, 4096) for layer in range(64))
    wide = config(dataclasses.replace(CONFIG.modules["wide"], sites=sites))
    wide = dataclasses.replace(wide, max_clamps=64)
    clamps = [
        {"post_block": {str(layer): [entry(f) for f in range(64)]}}
        for layer in range(64)
    ]
    specs = {FULL: [{"module_name": "wide", "clamps": c} for c in clamps]}
    started = time.process_time()
    request = parse(specs, wide)
    assert request.digest("prefill") == request.digest("decode")
    assert time.process_time() - started < 0.5


def test_the_cache_of_requests_is_bounded() -> None:
    fresh = config(*CONFIG.modules.values())
    for value in range(300):
        parse(one(DELTA, clamps=[entry(1, "scale", value)]), fresh)
    assert len(fresh.parsed) == 256
