# SPDX-License-Identifier: Apache-2.0
"""Engines whose tensor-parallel ranks share SAEs, and a batch that reaches whatever a
request can ask of such an SAE."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from steering_testing import matrix, models
from steering_testing.engine import (
    FULL,
    generate,
    params,
    sae_spec,
    save_sae,
)
from steering_testing.reads import activations, assert_reads
from steering_testing.reference import (
    Clamp,
    Edit,
    random_sae,
    random_transcoder,
)
from steering_testing.requests import Ask, Modules, Site, prompt, specs, vector
from steering_testing.tiers import unit_clamps

from vllm import LLM
from vllm.config.steering_json import Json
from vllm.config.steering_replies import METHOD, as_reply
from vllm.entrypoints.steering import (
    SteeringModuleError,
    register_module,
    unregister_module,
)

RANKS: dict[str, Any] = {
    "tensor_parallel_size": 2,
    "distributed_executor_backend": "mp",
}
WIDTH = 192  # a multiple of 16 features for each of two or four ranks
POST: Site = (1, "post_block")
# The module whose values are in units of unit-norm decoder rows.
UNIT = "unit"
INLINE = {"inline_vectors": {"post_block.1": 2}}
REFERENCE_NORM = 4.0
# Points that are not the stream's, and layers for them.
POINTS: list[Site] = [(0, "mlp_in"), (1, "attn_out"), (2, "mlp_out")]
TRANSCODERS: list[Site] = [(1, "mlp_in"), (2, "mlp_in")]
HUGE = 2.0**70  # beyond what a stream may hold


def shared(paths: Mapping[str, str]) -> dict[str, Any]:
    """The engine's `modules`; ranks share those that are SAEs."""
    return {
        name: path
        if path.endswith(".safetensors")
        else {"path": path, "sharding": "shard"}
        for name, path in paths.items()
    }


def weight_bytes(llm: LLM) -> list[int]:
    """What each rank holds for steering."""
    replies = llm.collective_rpc("change_steering_modules", args=("stats",))
    assert all(reply["ok"] for reply in replies), replies
    return [reply["stats"]["bytes"] for reply in replies]


def stats(llm: LLM) -> Json:
    """What the engine counts, as /metrics and the list of modules have it."""
    (answer,) = llm.collective_rpc(METHOD, args=("stats", {}))
    found = as_reply(answer).stats
    assert found is not None
    return found


@functools.cache
def modules() -> Modules:
    """SAEs of the stream and of other points, transcoders, and one that a norm
    guards."""
    saes = {
        kind: dict.fromkeys(matrix.SITES, random_sae(WIDTH, models.HIDDEN, kind, 11))
        for kind in ("jumprelu", "topk")
    }
    points = {
        site: random_sae(WIDTH, models.HIDDEN, kind, 20 + at)
        for at, (site, kind) in enumerate(
            zip(POINTS, ("relu", "jumprelu", "topk"), strict=True)
        )
    }
    transcoders = {
        site: random_transcoder(WIDTH, kind, 30 + at, skip=at == 0)
        for at, (site, kind) in enumerate(
            zip(TRANSCODERS, ("jumprelu", "topk"), strict=True)
        )
    }
    guarded = random_sae(WIDTH, models.HIDDEN, "jumprelu", 40)
    guarded.norm_limit = REFERENCE_NORM
    uneven = random_sae(WIDTH, models.HIDDEN, "jumprelu", 41)
    stretch = torch.linspace(0.5, 2.0, WIDTH).double()[:, None]
    uneven.W_dec = (uneven.W_dec * stretch).float().double()
    found = {
        **saes,
        UNIT: {POST: uneven},
        "points": points,
        "transcoders": transcoders,
        "guarded": {POST: guarded},
    }
    return Modules(found, {"vector": {POST: vector(4, norm=8.0)}})


def save(root: Path) -> dict[str, Any]:
    """The engine's `modules`."""
    found = shared(modules().save(root))
    guarded = {POST: modules().saes["guarded"][POST]}
    path = save_sae(root / "guarded", guarded, reference_norm=REFERENCE_NORM)
    found["guarded"] = {"path": path, "sharding": "shard", "norm_guard": 1.0}
    found[UNIT]["feature_units"] = "unit_decoder"
    return found


# Features of the first rank and of the second.
LOW, HIGH = 7, WIDTH - 3


def clamps() -> list[Clamp]:
    """Clamps of both ranks' features; the last needs a feature of the other rank."""
    return [
        Clamp(LOW, "absolute", 3.0),
        Clamp(HIGH, "scale", -2.0, True),
        Clamp(20, "additive", 1.5, when=(HIGH - 1, "above", 0.05)),
        Clamp(HIGH - 5, "absolute", 2.0, when=(21, "below", 0.05)),
    ]


def requests() -> list[list[Ask]]:
    """Every tier, point and phase, transcoders, conditions, spans, requests' own
    vectors and norm guards."""
    asked = matrix.requests()
    for name, sites in (("points", POINTS), ("transcoders", TRANSCODERS)):
        for tier in ("delta", "full"):
            asked += [[Ask(tier, name, {site: clamps()})] for site in sites]
        asked.append([Ask("full", name)])
    spans: list[tuple[str, int, int | None]] = [
        ("prompt", -3, None),
        ("generated", 1, 3),
    ]
    for kind in ("jumprelu", "topk"):
        asked.append([Ask("full", kind, {POST: clamps()}, spans=spans)])
        asked.append([Ask("delta", kind, {POST: clamps()}, spans=spans)])
    for tier in ("delta", "full"):
        asked.append([Ask(tier, "guarded", {POST: clamps()})])
        asked.append([Ask(tier, UNIT, {POST: clamps()[:2]})])
    asked += [
        [Ask("additive", vector=vector(6, norm=6.0), site=POST)],
        [
            Ask("additive", vector=vector(8), site=POST, kind="set", value=2.0),
            Ask("delta", "topk", {POST: clamps()}),
            Ask("full", "jumprelu", {POST: clamps()[:2]}),
            Ask("full", "transcoders", {TRANSCODERS[1]: clamps()}),
        ],
    ]
    return asked


def native(ask: Ask) -> Ask:
    """The same request with values in the SAE's own units."""
    if ask.module != UNIT:
        return ask
    (sae,) = modules().saes[UNIT].values()
    given = {at: unit_clamps(sae, list(own)) for at, own in ask.clamps.items()}
    return replace(ask, clamps=given)


def check_requests(
    llm: LLM,
    max_tokens: int = 5,
    tolerance: float = 1e-4,
    family: str = matrix.FAMILY,
) -> None:
    """Run `requests` in one batch; every result is that of Hugging Face."""
    asked = requests()
    prompts = [prompt(500 + at, 5 + at % 17) for at in range(len(asked))]
    sampling = [params(max_tokens, **specs(*asks)) for asks in asked]
    found = generate(llm, prompts, sampling)
    for result, ids, asks in zip(found, prompts, asked, strict=True):
        assert len(result.tokens) == max_tokens
        edits = modules().edits(*map(native, asks))
        matrix.assert_near(result, ids, edits, tolerance, f"{asks}", family)


@dataclass(frozen=True)
class Read:
    """One site to read, with `top_k` or the features."""

    module: str
    site: Site
    top_k: int | None = None
    features: tuple[int, ...] | None = None

    @property
    def spec(self) -> dict[str, Any]:
        layer, hook = self.site
        chosen: dict[str, Any] = {"top_k": self.top_k}
        if self.features is not None:
            chosen = {"features": list(self.features)}
        return {"module_name": self.module, "sites": {hook: [layer]}, **chosen}


def check_reading(
    llm: LLM,
    reads: list[Read],
    ask: Ask | None = None,
    tolerance: float = 1e-5,
    family: str = matrix.FAMILY,
) -> None:
    """A request reads several sites, while it is steered by `ask`."""
    every, ids = modules(), prompt(3, 9)
    steering = specs(ask) if ask is not None else {}
    edits = every.edits(ask) if ask is not None else {}
    saes = {read.site: every.saes[read.module][read.site] for read in reads}
    norms = every.saes[UNIT][POST].W_dec.norm(dim=1)
    wanted = params(5, sae_readout_specs=[read.spec for read in reads], **steering)
    (output,) = llm.generate([{"prompt_token_ids": ids}], wanted, use_tqdm=False)
    answer = list(output.outputs[0].token_ids)
    seen = activations(models.build(family), ids, answer, saes, edits)
    for read in reads:
        layer, hook = read.site
        at, acts = f"{hook}.{layer}", seen[read.site]
        features = None if read.features is None else list(read.features)
        for record, part, first in (
            (output.prompt_sae_features, acts[: len(ids)], 0),
            (output.outputs[0].sae_features, acts[len(ids) :], len(ids)),
        ):
            assert_reads(
                record[read.module][at],
                part,
                first,
                top_k=read.top_k,
                features=features,
                tolerance=tolerance,
                scale=norms if read.module == UNIT else None,
                label=f"{read}",
            )


def check_counters(llm: LLM, stages: int = 1) -> None:
    """A token that is steered, bypassed or saturated counts once, not once a rank."""
    ids, answer = prompt(901, 8), 4
    ask = params(answer, **{FULL: [sae_spec("jumprelu", {POST: [HUGE_CLAMP]})]})
    before = stats(llm)
    generate(llm, [ids], [ask])
    after = stats(llm)
    seen = len(ids) + answer - 1

    def grown(*path: str) -> int:
        old: Any = before["module_tokens"]["jumprelu"]
        new: Any = after["module_tokens"]["jumprelu"]
        for key in path:
            old, new = old[key], new[key]
        return new - old

    assert grown("steered", "full", "prefill") == len(ids)
    assert grown("steered", "full", "decode") == answer - 1
    assert grown("bypassed") == 1  # the bos
    assert grown("saturated") == seen - 1
    assert len(after["bytes"]) == 2 * stages


HUGE_CLAMP = Clamp(LOW, "absolute", HUGE)


def check_late_modules(
    llm: LLM,
    root: Path,
    site: Site,
    tolerance: float = 1e-4,
    family: str = matrix.FAMILY,
) -> None:
    """A sharded slot takes modules of its width, and each rank its part of them."""
    before = weight_bytes(llm)
    for kind in ("jumprelu", "topk"):
        sae = random_sae(LATE, models.HIDDEN, kind, 3)
        register_module(llm, "late", save_sae(root / f"late-{kind}", {site: sae}))
        ids = prompt(7, 21)
        [found] = generate(llm, [ids], [params(6, **{FULL: [sae_spec("late")]})])
        edits = {site: [Edit("full", sae)]}
        matrix.assert_near(found, ids, edits, tolerance, kind, family)
        unregister_module(llm, "late")
    narrow = random_sae(LATE - 32, models.HIDDEN, "relu", 3)
    path = save_sae(root / "narrow", {site: narrow})
    with pytest.raises(SteeringModuleError, match=f"of exactly {LATE} features"):
        register_module(llm, "narrow", path, sharding="shard")
    assert weight_bytes(llm) == before


LATE = 96


def late_slot(site: Site) -> dict[str, Any]:
    """An entry of `spare` for `check_late_modules`."""
    layer, hook = site
    return {"layer": layer, "hook": hook, "width": LATE, "sharding": "shard"}
