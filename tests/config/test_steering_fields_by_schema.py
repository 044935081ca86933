# SPDX-License-Identifier: Apache-2.0
"""Every field of the requests' JSON schema, with values of every wrong kind.

The schema of `/openapi.json` says where fields are, so a new field is tried, too.
"""

from __future__ import annotations

import base64
import copy
import json
import struct
import time
from collections.abc import Iterator
from typing import Any

import pytest
from steering_testing.mutations import JUNK, at, places, replaced

from vllm.config.sae_steering_specs import field_schemas
from vllm.config.sae_steering_types import EXTRA_ARGS_KEYS, parse_steering_request
from vllm.config.steering import InlineSite, ModuleInfo, SiteInfo, SteeringConfig
from vllm.config.steering_points import HookPoint
from vllm.exceptions import VLLMValidationError

FULL, DELTA, VECTORS, READOUT = EXTRA_ARGS_KEYS
POST, WIDTH, D_SAE = HookPoint.POST_BLOCK, 8, 16
SITE = SiteInfo(1, POST, WIDTH, D_SAE)
CONFIG = SteeringConfig(
    {
        "golden-gate": ModuleInfo("golden-gate", "sae", "p", "native", "d", (SITE,)),
        "v": ModuleInfo(
            "v", "vectors", "p", "native", "dv", (SiteInfo(1, POST, WIDTH, 1),)
        ),
    },
    inline_sites=(InlineSite(1, POST, WIDTH, 2, 6),),
)
ENTRY = {"feature_idx": 5, "kind": "absolute", "value": 2.5, "only_if_active": True}
ABOVE = {**ENTRY, "when": {"feature_idx": 3, "above": 0.5}}
BELOW = {**ENTRY, "feature_idx": 6, "when": {"feature_idx": 3, "below": 0.5}}
SPANS = [
    {"of": "prompt", "start": -2, "stop": -1},
    {"of": "generated", "start": 0, "stop": 5},
]
CLAMPS: list[Any] = [
    [ABOVE, BELOW],
    {"post_block": {"1": [ABOVE, BELOW]}},
    {"post_block.1": [ABOVE, BELOW]},
]
VECTOR = base64.b64encode(struct.pack(f"<{WIDTH}f", *[1.0] * WIDTH)).decode()
SAE: dict[str, Any] = {"module_name": "golden-gate"}
# By field, specs that have every property of its schema.
GOOD: dict[str, list[dict[str, Any]]] = {
    **dict.fromkeys(
        (FULL, DELTA),
        [
            {**SAE, "clamps": clamps, **when}
            for clamps in CLAMPS
            for when in ({"phase": "decode"}, {"spans": SPANS})
        ],
    ),
    VECTORS: [
        {"module_name": "v", "scale": 0.5, "phase": "both", "kind": "add"},
        {"module_name": "v", "kind": "set", "value": 1.0, "relative": True},
        {"module_name": "v", "kind": "bound", "bounds": [-1.0, 1.0], "spans": SPANS},
        {"vector": VECTOR, "layer": 1, "hook": "post_block", "scale": 2.0},
        {"vector": VECTOR, "site": "post_block.1", "scale": 2.0},
    ],
    READOUT: [
        {**SAE, "sites": {"post_block": [1]}, "top_k": 4, "phase": "both",
         "stop_if": [{"feature_idx": 1, "above": 2.0}]},
        {**SAE, "features": [3, 4]},
        {**SAE, "sites": ["post_block.1"], "top_k": 4},
    ],
}  # fmt: skip
EXTREMES: list[Any] = [
    *(float("nan"), float("inf"), float("-inf"), 3.4028236e38, -1e39, 10**38),
    *(-(2**63), D_SAE, "NaN", "5", "１", "../../etc/passwd", "golden-gate\x00", "𝕒"),
    *([[[[]]]] * 2, [{}] * 65, {"post_block": {"1": [ENTRY] * 5000}}, {"１": []}),
]


def properties(schema: dict[str, Any], path: tuple = ()) -> Iterator[tuple]:
    """Paths of all properties, with `*` for an item or for any key."""
    for name, inner in (schema.get("properties") or {}).items():
        yield (*path, name)
        yield from properties(inner, (*path, name))
    for inner in (schema.get("items"), schema.get("additionalProperties")):
        if isinstance(inner, dict):
            yield from properties(inner, (*path, "*"))
    for inner in schema.get("anyOf", ()):
        yield from properties(inner, path)


def known(path: tuple) -> tuple:
    """A path of a document as one of the schema."""
    names = {"post_block", "1", "post_block.1"}
    return tuple("*" if type(k) is int or k in names else k for k in path)


@pytest.mark.parametrize("field", EXTRA_ARGS_KEYS)
def test_the_good_specs_have_every_property_of_the_schema(field: str) -> None:
    found = {known(path) for path in places(GOOD[field])}
    assert set(properties(field_schemas()[field])) <= found
    for spec in GOOD[field]:
        assert parse_steering_request({field: [spec]}, CONFIG) is not None


def check(extra_args: Any, field: str) -> bool:
    """Whether a request is accepted; else the refusal is one that helps a client."""
    begin = time.monotonic()
    try:
        parsed = parse_steering_request(extra_args, CONFIG)
    except VLLMValidationError as error:
        text = str(error)
        assert error.parameter is not None and error.parameter.startswith(field)
        assert text.startswith(error.parameter), text
        assert text.isascii() and text.isprintable() and len(text) < 1000, text
        assert "expected" in text
        return False
    finally:
        assert time.monotonic() - begin < 2
    if parsed is not None:
        # What was accepted can be sent on, and has no number that is not finite.
        json.dumps(parsed.to_extra_args(), allow_nan=False).encode()
    return True


@pytest.mark.parametrize("field", EXTRA_ARGS_KEYS)
def test_a_wrong_value_anywhere_is_refused_with_its_path(field: str) -> None:
    """A value of a kind that the schema does not name is never accepted."""
    tried = 0
    for spec in GOOD[field]:
        good = {field: [copy.deepcopy(spec)]}
        for path in places(good):
            if not path:
                continue
            for junk in (*JUNK, *EXTREMES):
                bad = replaced(good, path, junk)
                accepted = check(bad, field)
                tried += 1
                kinds = {type(junk), type(at(good, path))}
                if accepted and not kinds <= {int, float}:
                    optional = junk is None or junk in ([], {})
                    text = {type(junk)} == kinds
                    assert optional or text, (path, junk)
    assert tried > 500


@pytest.mark.parametrize("field", EXTRA_ARGS_KEYS)
def test_an_unknown_key_anywhere_is_refused(field: str) -> None:
    for spec in GOOD[field]:
        good = {field: [copy.deepcopy(spec)]}
        for path in places(good):
            inner = at(good, path)
            if not path or not isinstance(inner, dict):
                continue
            for key in ("x", "", "Phase", "\ud800", "__class__", "a" * 5000, "../x"):
                assert not check(replaced(good, path, {**inner, key: 1}), field), path
