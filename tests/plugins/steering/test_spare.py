# SPDX-License-Identifier: Apache-2.0
"""`additional_config.steering.spare` and `module_roots`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

import vllm.plugins.steering as plugin
from vllm.config.steering import get_steering_config
from vllm.config.steering_checks import SteeringConfigError
from vllm.config.steering_points import HookPoint
from vllm.engine.arg_utils import EngineArgs
from vllm.engine.steering_resolution import resolve_steering

SITE = {"layer": 1, "hook": "resid_post"}


@pytest.fixture(scope="module")
def vllm_config(model_path: Path) -> Any:
    """A real configuration of the tiny model, not steered."""
    plugin.install_front_end_seams()
    args = EngineArgs(str(model_path), skip_tokenizer_init=True, max_model_len=128)
    return args.create_engine_config()


def resolved(vllm_config: Any, **steering: Any) -> Any:
    config = copy.copy(vllm_config)
    config.additional_config = {"steering": steering}
    resolve_steering(config)
    return get_steering_config(config.additional_config)


def test_spare_slots_are_listed_once_each(vllm_config: Any) -> None:
    spare = [{**SITE, "width": 64, "count": 2}, {**SITE, "vectors": 3}]
    slots = resolved(vllm_config, spare=spare).slots
    assert [(s.kind, s.width) for s in slots] == [("sae", 64)] * 2 + [
        ("vectors", 1)
    ] * 3
    assert {(s.layer, s.hook, s.topk, s.threshold) for s in slots} == {
        (1, HookPoint.POST_BLOCK, True, True)
    }


@pytest.mark.parametrize(
    "site",
    [
        {"site": "post_block.1"},
        {"site": "blocks.1.hook_resid_post"},
        {"site": ("resid_post", 1)},
    ],
    ids=str,
)
def test_a_site_is_named_as_in_requests(vllm_config: Any, site: Any) -> None:
    spare = [{**site, "width": 64}, {**site, "vectors": 1}]
    by_parts = [{**SITE, "width": 64}, {**SITE, "vectors": 1}]
    named = resolved(vllm_config, spare=spare).slots
    assert named == resolved(vllm_config, spare=by_parts).slots


@pytest.mark.parametrize(
    ("spare", "path", "accepted"),
    [
        ([{"width": 4}], "spare[0].site", "found the site None, expected HOOK.LAYER"),
        ([{"site": "post_block.3", "width": 4}], "spare[0].site", "a layer in 0..2"),
        ([{"site": "mlp.1", "width": 4}], "spare[0].site", "one of pre_attn, "),
        ([{"site": 1, "width": 4}], "spare[0].site", "such as post_block.2"),
        (
            [{"site": "post_block.1", **SITE, "width": 4}],
            "spare[0].layer",
            "found 1 beside site, expected only one of them",
        ),
        ([{"layer": 1, "width": 4}], "spare[0].hook", "found None, expected one of"),
        ({}, "spare", "a list"),
        ([3], "spare[0]", "an object"),
        ([{**SITE}], "spare[0]", "of width and vectors, expected exactly one"),
        (
            [{**SITE, "width": 4, "vectors": 1}],
            "spare[0]",
            "of width and vectors, expected exactly one",
        ),
        ([{**SITE, "width": True}], "spare[0].width", "an integer in 1.."),
        ([{**SITE, "width": 4, "count": 0}], "spare[0].count", "an integer in 1.."),
        ([{**SITE, "vectors": 2, "count": 2}], "spare[0].count", "only with width"),
        ([{**SITE, "layer": 3, "width": 4}], "spare[0].layer", "0..2"),
        ([{**SITE, "hook": "mlp", "width": 4}], "spare[0].hook", "post_block"),
        (
            [{**SITE, "width": 4, "size": 1}],
            "spare[0]",
            "hook_out, skip, width",
        ),
    ],
)
def test_a_bad_spare_slot_is_refused_by_its_path(
    vllm_config: Any, spare: Any, path: str, accepted: str
) -> None:
    with pytest.raises(SteeringConfigError) as caught:
        resolved(vllm_config, spare=spare)
    assert str(caught.value).startswith(f"additional_config.steering.{path}:")
    assert accepted in str(caught.value)


@pytest.mark.parametrize(
    ("roots", "message"),
    [
        ("/srv", "module_roots: found '/srv', expected a list"),
        ([3], r"module_roots\[0\]: found 3, expected one of absolute"),
        (["/srv", "saes"], r"module_roots\[1\]: found 'saes', expected one of"),
    ],
)
def test_bad_module_roots_are_refused(
    vllm_config: Any, roots: Any, message: str
) -> None:
    with pytest.raises(SteeringConfigError, match=message):
        resolved(vllm_config, module_roots=roots)


def test_good_module_roots_pass(vllm_config: Any) -> None:
    assert resolved(vllm_config, module_roots=["/srv/saes", "hf:", "hf:google"])


def test_an_engine_does_not_start_with_more_skip_sets_than_it_can_tell_apart(
    vllm_config: Any, sae_path: Path
) -> None:
    modules = {
        f"m{at}": {"path": str(sae_path), "skip_token_ids": [at]} for at in range(32)
    }
    with pytest.raises(SteeringConfigError) as caught:
        resolved(vllm_config, modules=modules)
    assert str(caught.value) == (
        "additional_config.steering.modules: skip_token_ids: found 32 distinct sets, "
        "expected at most 31 in one engine"
    )
    del modules["m31"]
    assert len(resolved(vllm_config, modules=modules).modules) == 31
