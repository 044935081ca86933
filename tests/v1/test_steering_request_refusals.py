# SPDX-License-Identifier: Apache-2.0
"""What is wrong in a request is refused with the path of the field."""

from __future__ import annotations

import dataclasses
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from steering_testing.specs import (
    ADDITIVE,
    CONFIG,
    D_SAE,
    DELTA,
    FULL,
    entry,
    one,
    parse,
    refusal,
)

from vllm.config.sae_steering_types import (
    EXTRA_ARGS_KEYS,
    SAEClampEntry,
    SAEClampSpec,
    SAEFullReconstructionSpec,
    SteeringSamplingParams,
    SteeringVectorSpec,
)
from vllm.exceptions import VLLMValidationError


def test_a_message_names_its_field_once() -> None:
    error = refusal({DELTA: 3})
    assert str(error) == f"{DELTA}: found 3, expected a list"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


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


def test_nesting_beyond_any_recursion_limit_is_refused() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    assert refusal({FULL: deep}).parameter == f"{FULL}[0]"
    assert refusal(one(DELTA, clamps=deep)).parameter == f"{DELTA}[0].clamps[0]"
    while deep:
        deep = deep.pop()


@pytest.mark.parametrize("value", [True, np.bool_(True), np.array([1.0])])
def test_what_equals_a_number_is_not_taken_for_it(value: Any) -> None:
    specs = [{"module_name": "one", "clamps": {"post_block": {"3": [entry(2)]}}}]
    assert parse({FULL: specs}) is not None
    specs[0]["clamps"]["post_block"]["3"][0]["value"] = value  # type: ignore[index]
    error = refusal({FULL: specs})
    assert str(error.parameter).endswith(".value")


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
    assert "enclose it in [...]" in str(error)


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
