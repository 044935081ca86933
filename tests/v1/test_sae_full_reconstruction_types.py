# SPDX-License-Identifier: Apache-2.0
"""Request types: what is accepted survives every codec, what is wrong is refused."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import random
import time
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm import SamplingParams
from vllm.config.sae_steering_types import (
    EXTRA_ARGS_KEYS,
    SAEClampEntry,
    SAEClampSpec,
    SAEFullReconstructionSpec,
    SteeringSamplingParams,
    SteeringVectorSpec,
    hash_steering_config,
    parse_steering_request,
)
from vllm.config.steering import (
    HookPoint,
    ModuleInfo,
    SiteInfo,
    SteeringConfig,
    Tier,
)
from vllm.exceptions import VLLMValidationError
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

D_SAE = 16
FULL, DELTA, ADDITIVE, READOUT = EXTRA_ARGS_KEYS
POST = HookPoint.POST_BLOCK
BIG = SiteInfo(3, POST, 8, 4096)


def module(name: str, *layers: int, kind: str = "sae", digest: str = "") -> ModuleInfo:
    d_sae = D_SAE if kind == "sae" else 1
    sites = [SiteInfo(layer, POST, 8, d_sae) for layer in layers]
    if kind == "sae" and len(layers) > 1:
        sites += [SiteInfo(layer, HookPoint.PRE_ATTN, 8, d_sae) for layer in layers]
    return ModuleInfo(name, kind, "p", "native", digest or f"d-{name}", tuple(sites))


def config(*modules: ModuleInfo, max_clamps: int = 8) -> SteeringConfig:
    return SteeringConfig({m.name: m for m in modules}, max_clamps)


CONFIG = config(
    module("wide", 1, 2),
    module("other", 1, 2),
    module("one", 3),
    module("v1", 1, kind="vectors"),
    module("v2", 1, 2, kind="vectors"),
)


def parse(extra_args: dict[str, Any] | None, cfg: SteeringConfig | None = CONFIG):
    return parse_steering_request(extra_args, cfg)


def entry(feature: int = 0, kind: str = "absolute", value: float = 1.0, **more: Any):
    return {"feature_idx": feature, "kind": kind, "value": value, **more}


def refusal(extra_args: Any, cfg: SteeringConfig | None = CONFIG):
    with pytest.raises(VLLMValidationError) as caught:
        parse(extra_args, cfg)
    assert caught.value.parameter is not None
    assert caught.value.parameter in str(caught.value)
    str(caught.value).encode("ascii")
    return caught.value


values = st.floats(-1e6, 1e6, width=32)
entries = st.lists(
    st.builds(
        entry,
        st.integers(0, D_SAE - 1),
        st.sampled_from(["absolute", "additive", "scale"]),
        values,
        only_if_active=st.booleans(),
    ),
    min_size=1,
    max_size=4,
    unique_by=lambda e: e["feature_idx"],
)
phases = st.sampled_from(["both", "prefill", "decode"])


@st.composite
def sae_specs(draw: Any, name: str) -> dict[str, Any]:
    hooks = draw(
        st.lists(st.sampled_from(["post_block", "pre_attn"]), min_size=1, unique=True)
    )
    layers = st.lists(st.sampled_from(["1", "2"]), min_size=1, unique=True)
    clamps = {h: {layer: draw(entries) for layer in draw(layers)} for h in hooks}
    return {"module_name": name, "clamps": clamps, "phase": draw(phases)}


@st.composite
def requests(draw: Any) -> dict[str, Any]:
    vectors = st.builds(
        lambda name, scale, phase: {
            "module_name": name,
            "scale": scale,
            "phase": phase,
        },
        st.sampled_from(["v1", "v2"]),
        values,
        phases,
    )
    delta = [
        draw(sae_specs(n)) for n in draw(st.sets(st.sampled_from(["wide", "other"])))
    ]
    return {
        FULL: [draw(sae_specs("wide")), {"module_name": "one"}],
        DELTA: delta if sum(_clamps_at(s) for s in delta) <= 8 else delta[:1],
        ADDITIVE: draw(st.lists(vectors, max_size=3)),
    }


def _clamps_at(spec: dict[str, Any]) -> int:
    return max(len(e) for layers in spec["clamps"].values() for e in layers.values())


def digests(extra_args: Any, cfg: SteeringConfig = CONFIG) -> tuple[Any, ...]:
    request = parse(extra_args, cfg)
    return request.digest("prefill"), request.digest("decode")


fast = settings(max_examples=60, deadline=None)


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


@fast
@given(requests(), st.randoms())
def test_order_never_changes_the_hash(extra_args: Any, rng: random.Random) -> None:
    shuffled = copy.deepcopy(extra_args)

    def shuffle(node: Any) -> Any:
        if isinstance(node, dict):
            items = [(key, shuffle(value)) for key, value in node.items()]
            rng.shuffle(items)
            return dict(items)
        if isinstance(node, list):
            node = [shuffle(item) for item in node]
            rng.shuffle(node)
        return node

    assert digests(shuffle(shuffled)) == digests(extra_args)


@pytest.mark.parametrize("kind", ["absolute", "additive", "scale"])
def test_negative_zero_hashes_as_zero(kind: str) -> None:
    with_sign = {DELTA: [{"module_name": "one", "clamps": [entry(1, kind, -0.0)]}]}
    without = {DELTA: [{"module_name": "one", "clamps": [entry(1, kind, 0.0)]}]}
    assert digests(with_sign) == digests(without)


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


def one(tier_key: str, **changes: Any) -> dict[str, Any]:
    spec = {"module_name": "one", "clamps": [entry(2, "absolute", 1.5)], **changes}
    return {tier_key: [spec]}


def test_tiers_never_collide() -> None:
    assert len({digests(one(FULL)), digests(one(DELTA))}) == 2
    with_both = {**one(FULL), **one(DELTA)}
    assert digests(with_both) not in (digests(one(FULL)), digests(one(DELTA)))


@pytest.mark.parametrize(
    "changed",
    [
        entry(3, "absolute", 1.5),
        entry(2, "additive", 1.5),
        entry(2, "absolute", 1.25),
        entry(2, "absolute", 1.5, only_if_active=True),
    ],
)
def test_any_other_content_changes_the_hash(changed: dict[str, Any]) -> None:
    assert digests(one(FULL, clamps=[changed])) != digests(one(FULL))


def test_another_module_changes_the_hash() -> None:
    a, b = ({DELTA: [{"module_name": n, "clamps": {"post_block": {1: [entry()]}}}]}
            for n in ("wide", "other"))  # fmt: skip
    assert digests(a) != digests(b)


def test_other_weights_change_the_hash() -> None:
    replaced = config(module("one", 3, digest="new"))
    assert digests(one(FULL), replaced) != digests(one(FULL), config(module("one", 3)))


def test_other_bypassed_tokens_change_the_hash() -> None:
    from dataclasses import replace

    bypassing = config(replace(module("one", 3), skip_token_ids=(1,)))
    assert digests(one(FULL), bypassing) != digests(one(FULL), config(module("one", 3)))


def test_registration_order_of_delta_modules_is_in_the_hash() -> None:
    specs = {
        DELTA: [
            {"module_name": n, "clamps": {"post_block": {1: [entry()]}}}
            for n in ("wide", "other")
        ]
    }
    ab = config(module("wide", 1, 2), module("other", 1, 2))
    ba = config(module("other", 1, 2), module("wide", 1, 2))
    assert digests(specs, ab) != digests(specs, ba)


@fast
@given(requests())
def test_steering_for_both_phases_hashes_the_same_in_each(extra_args: Any) -> None:
    for specs in extra_args.values():
        for spec in specs:
            spec["phase"] = "both"
    prefill, decode = digests(extra_args)
    assert prefill is not None
    assert prefill == decode


def test_naming_two_phases_is_naming_both() -> None:
    halves = {
        ADDITIVE: [
            {"module_name": "v1", "phase": phase} for phase in ("prefill", "decode")
        ]
    }
    assert digests(halves) == digests({ADDITIVE: [{"module_name": "v1"}]})


def test_a_phase_with_no_edit_has_no_digest() -> None:
    prefill, decode = digests(one(FULL, phase="decode"))
    assert prefill is None
    assert decode is not None


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


def test_the_hash_covers_the_digests_it_is_given() -> None:
    request = parse(one(FULL))
    own = hash_steering_config(request, "decode", request.module_digests)
    assert own == request.digest("decode")
    assert own != hash_steering_config(request, "decode", {"one": "else"})


@pytest.mark.parametrize("nothing", [None, {}, {FULL: None}, {FULL: []}, {"else": 1}])
def test_nothing_asked_is_no_request(nothing: Any) -> None:
    assert parse(nothing, None) is None


@pytest.mark.parametrize("key", EXTRA_ARGS_KEYS)
def test_steering_without_a_configuration_says_how_to_start_with_it(key: str) -> None:
    error = refusal({key: [{"module_name": "one"}]}, None)
    assert error.parameter == key
    assert "--steering-modules" in str(error)


NASTY = [
    None, True, 1.9, -1, D_SAE, 10**400, math.nan, math.inf, -math.inf, 1e39, "no",
    "\ud800", b"x", [], {}, [[]], object(), ("a",), "x" * 10_000, {None: 1},
]  # fmt: skip

FIELDS = {
    "feature_idx": (0, 1, D_SAE - 1),
    "kind": ("absolute", "additive", "scale"),
    "value": (0, 1, 1.9, -1, D_SAE),
    "only_if_active": (True, False),
}


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("bad", NASTY, ids=lambda v: ascii(v)[:20])
def test_a_corrupt_entry_field_is_refused_by_its_path(field: str, bad: Any) -> None:
    if any(type(bad) is type(good) and bad == good for good in FIELDS[field]):
        return
    broken = {**entry(1), field: bad}
    specs = {FULL: [{"module_name": "wide", "clamps": {"post_block": {
        "1": [entry(5), broken]}}}]}  # fmt: skip
    path = f"{FULL}[0].clamps.post_block.1[1].{field}"
    assert refusal(specs).parameter == path


@pytest.mark.parametrize("field", ["module_name", "clamps", "phase"])
@pytest.mark.parametrize("bad", NASTY, ids=lambda v: ascii(v)[:20])
def test_a_corrupt_spec_field_is_refused_by_its_path(field: str, bad: Any) -> None:
    specs = {DELTA: [{"module_name": "wide", "clamps": {"post_block": {1: [entry()]}},
                      field: bad}]}  # fmt: skip
    assert refusal(specs).parameter.startswith(f"{DELTA}[0].{field}")


@pytest.mark.parametrize("key", EXTRA_ARGS_KEYS)
@pytest.mark.parametrize("bad", NASTY[1:], ids=lambda v: ascii(v)[:20])
def test_what_is_no_list_of_specs_is_refused(key: str, bad: Any) -> None:
    if bad in ([], ()):
        return
    assert refusal({key: bad}).parameter.startswith(key)


@pytest.mark.parametrize("bad", ["07", "+7", " 7", "7 ", "1_0", "", "\u0661", -1, True,
                                 1.0, None, "9" * 5000, 10**400, "\ud800"])  # fmt: skip
def test_a_layer_key_that_is_not_canonical_is_refused(bad: Any) -> None:
    specs = {
        DELTA: [{"module_name": "wide", "clamps": {"post_block": {bad: [entry()]}}}]
    }
    assert refusal(specs).parameter.startswith(f"{DELTA}[0].clamps.post_block")


@pytest.mark.parametrize("hook", ["post", "POST_BLOCK", "", None, 1, "\ud800"])
def test_an_unknown_hook_is_refused(hook: Any) -> None:
    specs = {DELTA: [{"module_name": "wide", "clamps": {hook: {1: [entry()]}}}]}
    assert refusal(specs).parameter.startswith(f"{DELTA}[0].clamps")


REFUSED = {
    "a layer named by int and string": (
        {DELTA: [{"module_name": "wide",
                  "clamps": {"post_block": {1: [entry()], "1": [entry()]}}}]},
        f"{DELTA}[0].clamps.post_block.1",
    ),
    "a hook named by two aliases": (
        {DELTA: [{"module_name": "wide", "clamps": {
            "post_block": {1: [entry()]}, "post_mlp": {2: [entry()]}}}]},
        f"{DELTA}[0].clamps.post_mlp",
    ),
    "a site the module does not cover": (
        {DELTA: [{"module_name": "wide", "clamps": {"post_block": {7: [entry()]}}}]},
        f"{DELTA}[0].clamps.post_block.7",
    ),
    "an unknown field": (
        {DELTA: [{"module_name": "one", "clamps": [entry()], "strength": 1}]},
        f"{DELTA}[0].strength",
    ),
    "an unknown entry field": (
        {DELTA: [{"module_name": "one", "clamps": [entry(0, extra=1)]}]},
        f"{DELTA}[0].clamps[0].extra",
    ),
    "a missing field": (
        {DELTA: [{"module_name": "one", "clamps": [{"feature_idx": 1}]}]},
        f"{DELTA}[0].clamps[0].kind",
    ),
    "a delta spec without clamps": (
        {DELTA: [{"module_name": "one", "clamps": []}]}, f"{DELTA}[0].clamps",
    ),
    "a delta site without clamps": (
        {DELTA: [{"module_name": "wide", "clamps": {"post_block": {1: []}}}]},
        f"{DELTA}[0].clamps.post_block.1",
    ),
    "a bare list for several sites": (
        {DELTA: [{"module_name": "wide", "clamps": [entry()]}]}, f"{DELTA}[0].clamps",
    ),
    "a feature twice in a list": (
        {DELTA: [{"module_name": "one", "clamps": [entry(1), entry(1)]}]},
        f"{DELTA}[0].clamps[1].feature_idx",
    ),
    "a feature twice in two specs": (
        {FULL: [{"module_name": "one", "clamps": [entry(1)], "phase": "prefill"},
                {"module_name": "one", "clamps": [entry(1)], "phase": "decode"}]},
        f"{FULL}[1].clamps[0].feature_idx",
    ),
    "two modules reconstructing a site": (
        {FULL: [{"module_name": "wide"},
                {"module_name": "other", "clamps": {"post_block": {1: []}}}]},
        f"{FULL}[1].clamps.post_block.1",
    ),
    "more clamps than configured": (
        {DELTA: [{"module_name": "one", "clamps": [entry(i) for i in range(9)]}]},
        f"{DELTA}[0].clamps",
    ),
    "more clamps than configured over two specs": (
        {DELTA: [{"module_name": "one", "clamps": [entry(i) for i in range(5)]},
                 {"module_name": "one", "clamps": [entry(i) for i in range(5, 10)]}]},
        f"{DELTA}[1].clamps",
    ),
    "vectors where an SAE is needed": (
        {FULL: [{"module_name": "v1"}]}, f"{FULL}[0].module_name",
    ),
    "an SAE where vectors are needed": (
        {ADDITIVE: [{"module_name": "one"}]}, f"{ADDITIVE}[0].module_name",
    ),
    "scales whose sum is not finite": (
        {ADDITIVE: [{"module_name": "v1", "scale": 3e38}] * 2},
        f"{ADDITIVE}[1].scale",
    ),
    "a spec of another tier": ({FULL: [SteeringVectorSpec("v1")]}, f"{FULL}[0]"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_refused_with_the_path_of_the_field(what: str) -> None:
    extra_args, path = REFUSED[what]
    assert refusal(extra_args).parameter == path


def test_the_reserved_feature_range_is_all_of_d_sae() -> None:
    for feature in (0, D_SAE - 1):
        assert parse(one(DELTA, clamps=[entry(feature)])) is not None


def test_nesting_beyond_any_recursion_limit_is_refused() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    assert refusal({FULL: deep}).parameter == f"{FULL}[0]"
    assert refusal(one(DELTA, clamps=deep)).parameter == f"{DELTA}[0].clamps[0]"
    while deep:
        deep = deep.pop()


def test_the_same_json_is_parsed_once() -> None:
    def asked() -> dict[str, Any]:
        specs = [{"module_name": "one", "clamps": {"post_block": {"3": [entry(2)]}}}]
        return {FULL: specs, "other_key": object()}

    assert parse(asked()) is parse(asked())
    # An equal configuration may hold other weights by the time that it is another.
    again = config(*CONFIG.modules.values())
    assert parse(asked(), again) == parse(asked())
    assert parse(asked(), again) is not parse(asked())


@pytest.mark.parametrize("value", [True, np.bool_(True), np.array([1.0])])
def test_what_equals_a_number_is_not_taken_for_it(value: Any) -> None:
    specs = [{"module_name": "one", "clamps": {"post_block": {"3": [entry(2)]}}}]
    assert parse({FULL: specs}) is not None
    specs[0]["clamps"]["post_block"]["3"][0]["value"] = value  # type: ignore[index]
    error = refusal({FULL: specs})
    assert str(error.parameter).endswith(".value")


def test_long_requests_are_not_kept() -> None:
    wide = config(dataclasses.replace(CONFIG.modules["one"], sites=(BIG,)))
    wide = dataclasses.replace(wide, max_clamps=2000)
    specs = [
        {
            "module_name": "one",
            "clamps": {"post_block": {"3": [entry(f) for f in range(2000)]}},
        }
    ]
    assert parse({FULL: specs}, wide) == parse({FULL: specs}, wide)
    assert parse({FULL: specs}, wide) is not parse({FULL: specs}, wide)


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


@pytest.mark.parametrize(
    "scalar",
    [torch.tensor(True), np.True_, torch.tensor([3]), np.array([3]), torch.tensor(3.0),
     np.float64(3), 3.0, "3"],
)  # fmt: skip
def test_what_is_no_integer_is_no_feature(scalar: Any) -> None:
    error = refusal(one(DELTA, clamps=[entry(scalar)]))
    assert error.parameter == f"{DELTA}[0].clamps[0].feature_idx"


@pytest.mark.parametrize(
    ("specs", "path"),
    [
        ({"module_name": "one"}, FULL),
        (SAEFullReconstructionSpec("one"), FULL),
        ([{"module_name": "one", "clamps": entry()}], f"{FULL}[0].clamps"),
        (
            [SAEFullReconstructionSpec("one", SAEClampEntry(1, "scale", 1.0))],
            f"{FULL}[0].clamps",
        ),
        (
            [{"module_name": "wide", "clamps": {"post_block": {"1": entry()}}}],
            f"{FULL}[0].clamps.post_block.1",
        ),
    ],
)
def test_one_object_where_a_list_is_expected_says_what_to_write(
    specs: Any, path: str
) -> None:
    error = refusal({FULL: specs})
    assert error.parameter == path
    assert "write [...] around it" in str(error)


def test_specs_are_counted_before_they_are_read() -> None:
    many = [{"module_name": "one"}] * (CONFIG.max_specs + 1)
    error = refusal({FULL: many[:-1], ADDITIVE: [object()]})
    assert f"found {len(many)} specs" in str(error)
    wider = dataclasses.replace(CONFIG, max_specs=len(many))
    assert parse({FULL: many}, wider) is not None


def test_sites_and_clamps_are_counted_before_they_are_read() -> None:
    layers = {str(layer): [object()] for layer in range(2000)}
    error = refusal({FULL: [{"module_name": "one", "clamps": {"post_block": layers}}]})
    assert "sites" in str(error)
    entries = {"3": [object()] * 5000}
    error = refusal({FULL: [{"module_name": "one", "clamps": {"post_block": entries}}]})
    assert "clamps" in str(error)


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


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("sae_full_reconstruction_spec", FULL),
        ("SAE_full_reconstruction_specs", FULL),
        ("full_reconstruction_specs", FULL),
        ("sae_full_recon_specs", FULL),
        ("sae-clamp-specs", DELTA),
        ("sae_clamps", DELTA),
        ("steering_vectors", ADDITIVE),
        ("steering_vector", ADDITIVE),
    ],
)
def test_a_misspelt_key_is_refused_with_the_right_name(key: str, meant: str) -> None:
    for configured in (CONFIG, None):
        error = refusal({key: [{"module_name": "one"}]}, configured)
        assert error.parameter == f"extra_args.{key}"
        assert f"expected {meant}" in str(error)
    with pytest.raises(VLLMValidationError, match=meant):
        SteeringSamplingParams(extra_args={key: 1})


@pytest.mark.parametrize(
    "key", ["kv_transfer_params", "seed", "specs", "clamp", "x" * 99, 3, "saelens"]
)
def test_other_keys_are_nobodys_business(key: Any) -> None:
    assert parse({key: 1}) is None


def test_specs_without_the_plugin_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other,another")
    with pytest.raises(VLLMValidationError, match="VLLM_PLUGINS=other,another"):
        SteeringSamplingParams(sae_clamp_specs=[SAEClampSpec("one", [])])
    assert SteeringSamplingParams(max_tokens=3).max_tokens == 3
    monkeypatch.setenv("VLLM_PLUGINS", "other,steering")
    params = SteeringSamplingParams(sae_clamp_specs=[SAEClampSpec("one", [])])
    assert DELTA in params.extra_args
