# SPDX-License-Identifier: Apache-2.0
"""A request may name a site as the module's description prints it: `hook.layer`."""

from __future__ import annotations

from typing import Any

import pytest
from steering_testing.specs import CONFIG, DELTA, FULL, READOUT, entry, parse, refusal

from vllm.config.sae_steering_types import (
    SAEClampEntry,
    SAEClampSpec,
    SAEFullReconstructionSpec,
    SAEReadoutSpec,
)

WIDE = CONFIG.modules["wide"]
ENTRY = SAEClampEntry(3, "absolute", 2.0)


def clamps_of(clamps: Any, key: str = DELTA, module: str = "wide") -> Any:
    return parse({key: [{"module_name": module, "clamps": clamps}]})


@pytest.mark.parametrize("key", [DELTA, FULL])
def test_every_site_goes_by_the_name_that_the_module_prints(key: str) -> None:
    assert len(WIDE.sites) == 4
    for site in WIDE.sites:
        nested = {site.hook.value: {site.layer: [entry(3)]}}
        assert clamps_of({site.name: [entry(3)]}, key) == clamps_of(nested, key)


@pytest.mark.parametrize(
    "name", ["post_block.2", "blocks.2.hook_resid_post", "layers.2.post_block"]
)
def test_a_site_may_be_spelt_as_libraries_do(name: str) -> None:
    assert clamps_of({name: [entry(3)]}) == clamps_of({"post_block": {2: [entry(3)]}})


def test_names_of_sites_and_hooks_may_stand_side_by_side() -> None:
    mixed = {"post_block.1": [entry(3)], "post_block": {2: [entry(4)]}}
    nested = {"post_block": {1: [entry(3)], 2: [entry(4)]}}
    assert clamps_of(mixed) == clamps_of(nested)


def test_classes_and_json_are_the_same_request() -> None:
    by_class = SAEClampSpec("wide", {"post_block.1": [ENTRY]})
    assert parse({DELTA: [by_class]}) == clamps_of(
        {"post_block.1": [entry(3, value=2.0)]}
    )


def test_a_listed_site_without_entries_is_reconstructed() -> None:
    spec = SAEFullReconstructionSpec("wide", {"post_block.2": []})
    assert parse({FULL: [spec]}) == clamps_of({"post_block": {2: []}}, FULL)


def test_the_name_of_the_only_site_is_accepted() -> None:
    named = clamps_of({"post_block.3": [entry(3)]}, module="one")
    assert named == clamps_of([entry(3)], module="one")


def test_reads_go_by_the_same_names() -> None:
    named = SAEReadoutSpec("wide", sites=["post_block.2", "pre_attn.1"], top_k=2)
    nested = {"post_block": [2], "pre_attn": [1]}
    asked = {"module_name": "wide", "sites": nested, "top_k": 2}
    assert parse({READOUT: [named]}) == parse({READOUT: [asked]})


SITES = "'post_block.1', 'post_block.2', 'pre_attn.1', 'pre_attn.2'"
BAD_CLAMPS: list[tuple[Any, str, str]] = [
    ({"post_blok.1": [entry()]}, "['post_blok.1']", f"'post_blok.1'.*{SITES}"),
    ({"layer1": [entry()]}, ".layer1", f"site 'layer1'.*{SITES}.*pre_"),
    ({"": [entry()]}, "['']", SITES),
    ({"post_block.7": [entry()]}, "['post_block.7']", f"layer 7 at .*{SITES}"),
    ({"mlp_out.1": [entry()]}, "['mlp_out.1']", f"layer 1 at mlp_out.*{SITES}"),
    ({"post_block": [entry()]}, ".post_block", f"found a list.*{SITES}"),
    ({"post_block.1": {1: [entry()]}}, "['post_block.1']", "found an object"),
    ({"post_block.1": {}}, "['post_block.1']", "found an object"),
    ({"post_block.1": entry()}, "['post_block.1']", "a single object.*enclose it in"),
    ({"post_block.1": 5}, "['post_block.1']", "found 5, expected a list of"),
    ({"post_block.1": []}, "['post_block.1']", "found an empty list"),
    ({1: [entry()]}, ".1", 'found 1, expected a site such as "post_block.20"'),
    ({"post_block.1": [entry(99)]}, "['post_block.1'][0].feature_idx", "found 99"),
    ([entry()], "", f"found a list.*{SITES}"),
    (
        {"post_block.1": [entry()], "resid_post.1": [entry(1)]},
        "['resid_post.1']",
        r"post_block.1 is given twice \(also as .*\['post_block.1'\]\), expected once",
    ),
    (
        {"post_block": {1: [entry()]}, "post_block.1": [entry(1)]},
        "['post_block.1']",
        "given twice",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("clamps", "path", "message"), BAD_CLAMPS)
def test_a_bad_name_is_refused_with_the_names_of_the_module(
    clamps: Any, path: str, message: str
) -> None:
    error = refusal({DELTA: [{"module_name": "wide", "clamps": clamps}]})
    assert error.parameter == f"{DELTA}[0].clamps{path}"
    with pytest.raises(type(error), match=message):
        raise error


BAD_READS: list[tuple[Any, str, str]] = [
    (["post_blok.1"], "[0]", f"found 'post_blok.1'.*{SITES}"),
    (["post_block"], "[0]", f"found 'post_block'.*{SITES}"),
    (["post_block.1", "post_block.9"], "[1]", f"layer 9 at post_block.*{SITES}"),
    (["post_block.1", "resid_post.1"], "[1]", "read at post_block.1 twice"),
    ([], "", "is empty"),
    ([1], "[0]", 'found 1, expected a site such as "post_block.20"'),
    ("post_block.1", "", "found 'post_block.1', expected null, a list of sites"),
    ({"post_block.1": [1]}, "['post_block.1']", r"such as \['post_block.1'\]"),
    ({"post_block": 1}, ".post_block", "found 1, expected a list of layer indices"),
]  # fmt: skip


@pytest.mark.parametrize(("sites", "path", "message"), BAD_READS)
def test_a_bad_site_of_a_read_is_refused(sites: Any, path: str, message: str) -> None:
    error = refusal({READOUT: [{"module_name": "wide", "top_k": 1, "sites": sites}]})
    assert error.parameter == f"{READOUT}[0].sites{path}"
    with pytest.raises(type(error), match=message):
        raise error
