# SPDX-License-Identifier: Apache-2.0
"""Modules without files, and requests for them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st

from vllm.config.sae_steering_admission import admitted_extra_args
from vllm.config.sae_steering_types import (
    EXTRA_ARGS_KEYS,
    parse_steering_request,
)
from vllm.config.steering import ModuleInfo, SiteInfo, SteeringConfig
from vllm.config.steering_points import HookPoint
from vllm.exceptions import VLLMValidationError

D_SAE = 16
FULL, DELTA, ADDITIVE, READOUT = EXTRA_ARGS_KEYS
POST = HookPoint.POST_BLOCK


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


def admitted(given: Any, config: SteeringConfig, length: int) -> Any:
    """What the engine writes into a request's `extra_args`."""
    steering = parse_steering_request(given, config)
    return admitted_extra_args(given, steering, config, length)


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


fast = settings(max_examples=60)


def one(tier_key: str, **changes: Any) -> dict[str, Any]:
    spec = {"module_name": "one", "clamps": [entry(2, "absolute", 1.5)], **changes}
    return {tier_key: [spec]}
