# SPDX-License-Identifier: Apache-2.0
"""What a request's digest depends on, and what it does not."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from steering_testing.specs import (
    ADDITIVE,
    DELTA,
    FULL,
    config,
    digests,
    entry,
    fast,
    module,
    one,
    parse,
    requests,
)

from vllm.config.sae_steering_types import hash_steering_config


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


def test_the_hash_covers_the_digests_it_is_given() -> None:
    request = parse(one(FULL))
    own = hash_steering_config(request, "decode", request.module_digests)
    assert own == request.digest("decode")
    assert own != hash_steering_config(request, "decode", {"one": "else"})
