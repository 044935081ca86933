# SPDX-License-Identifier: Apache-2.0
"""One engine's worth of modules for the tests of the tiers, and the requests that
combine them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from steering_testing import models, oracle
from steering_testing.engine import assert_same, generate, params, save_sae
from steering_testing.oracle import Greedy
from steering_testing.reference import Clamp, DenseSAE, random_sae
from steering_testing.requests import Ask, Modules, Site, prompt, specs, vector

from vllm import LLM

FAMILY = "llama"
D_SAE, MAX_TOKENS = 96, 5
POST, PRE, MID = (1, "post_block"), (0, "pre_attn"), (2, "post_attn")
NEXT = (2, "pre_attn")  # the same tensor as POST
CUSTOM_SKIP = (7, 9, 11, 40, 41, 42, 43)
EVERY_TOKEN = tuple(range(models.VOCAB))
REFERENCE_NORM = 4.0


def sae(activation: str, seed: int, skip: tuple[int, ...] = models.SPECIAL) -> DenseSAE:
    found = random_sae(D_SAE, models.HIDDEN, activation, seed)
    found.skip_token_ids = skip
    return found


def identity_sae() -> DenseSAE:
    """Two features for each direction: its positive and its negative part."""
    eye = torch.eye(models.HIDDEN).double()
    both = torch.cat([eye, -eye])
    zeros = torch.zeros(models.HIDDEN).double()
    return DenseSAE(both, zeros.repeat(2), both, zeros, skip_token_ids=models.SPECIAL)


def uneven_sae(activation: str, seed: int) -> DenseSAE:
    """An SAE whose decoder rows have norms from one half to two."""
    found = sae(activation, seed)
    stretch = torch.linspace(0.5, 2.0, D_SAE).double()[:, None]
    found.W_dec = (found.W_dec * stretch).float().double()
    return found


def guarded_sae(norm_guard: float) -> DenseSAE:
    found = sae("relu", 30)
    found.norm_limit = norm_guard * REFERENCE_NORM
    return found


@dataclass
class Option:
    """What an engine's configuration says of one module besides its path."""

    options: dict[str, Any]
    metadata: dict[str, Any]


OPTIONS = {
    "skip_custom": Option({"skip_token_ids": list(CUSTOM_SKIP)}, {}),
    "skip_none": Option({"skip_token_ids": []}, {}),
    "skip_all": Option({"skip_token_ids": list(EVERY_TOKEN)}, {}),
    "guard_some": Option({"norm_guard": 1.0}, {"reference_norm": REFERENCE_NORM}),
    "guard_all": Option({"norm_guard": 1e-3, "reference_norm": REFERENCE_NORM}, {}),
    "unit": Option({"feature_units": "unit_decoder"}, {}),
    "unit_topk": Option({"feature_units": "unit_decoder"}, {}),
}


def tier_modules() -> Modules:
    """Every kind of SAE at one site, some at others too, and vectors."""
    return Modules(
        {
            "a": {POST: sae("jumprelu", 1), PRE: sae("jumprelu", 2)},
            "b": {POST: sae("relu", 3), MID: sae("relu", 4)},
            "t": {POST: sae("topk", 5)},
            "identity": {POST: identity_sae()},
            "skip_custom": {POST: sae("relu", 30, CUSTOM_SKIP)},
            "skip_none": {POST: sae("relu", 30, ())},
            "skip_all": {POST: sae("relu", 30, EVERY_TOKEN)},
            "guard_some": {POST: guarded_sae(1.0)},
            "guard_all": {POST: guarded_sae(1e-3)},
            "unit": {POST: uneven_sae("relu", 31)},
            "unit_topk": {POST: uneven_sae("topk", 32)},
        },
        {
            "v": {POST: vector(1), PRE: vector(2, norm=1.0)},
            "w": {POST: vector(3)},
            # What clamps of `a` and `b` add, as vectors at the site and right after.
            "dec_a": {POST: sae("jumprelu", 1).W_dec[8].float()},
            "dec_b": {POST: sae("relu", 3).W_dec[9].float()},
            "dec_a_next": {NEXT: sae("jumprelu", 1).W_dec[8].float()},
        },
    )


def save_modules(modules: Modules, root: Path) -> dict[str, Any]:
    """The engine's `modules` configuration."""
    found: dict[str, Any] = dict(modules.save(root))
    for name, option in OPTIONS.items():
        if option.metadata:
            save_sae(root / name, modules.saes[name], **option.metadata)
        found[name] = {"path": found[name], **option.options}
    return found


def every_kind(tier: str, module: str, features: Sequence[int]) -> list[list[Ask]]:
    """One request for each clamp kind, with and without the condition."""
    values = {"absolute": 2.5, "additive": 1.5, "scale": -2.0}
    return [
        [Ask(tier, module, {POST: [Clamp(f, kind, value, only) for f in features]})]
        for kind, value in values.items()
        for only in (False, True)
    ]


def combinations() -> list[list[Ask]]:
    """Requests of one batch: tiers, modules, sites and phases combined."""
    a, b = (
        [Clamp(8, "absolute", 3.0)],
        [Clamp(9, "scale", 2.5), Clamp(2, "additive", 1)],
    )
    same_site = [
        Ask("additive", "v", scale=0.7),
        Ask("delta", "a", {POST: a}),
        Ask("full", "b", {POST: b}),
    ]
    return [
        same_site,
        same_site[::-1],
        [
            Ask("additive", "v", scale=-1.2),
            Ask("delta", "b", {MID: b, POST: b}),
            Ask("full", "a", {PRE: a, POST: []}),
        ],
        [Ask("additive", "v", scale=1.5), Ask("additive", "w", scale=-2.0)],
        [Ask("additive", "w", scale=1.0), Ask("additive", "w", scale=0.25)],
        [Ask("full", "a", {POST: a}), Ask("full", "b", {MID: b})],
        [Ask("full", "b", {POST: b})],
        [Ask("full", "t", {POST: a})],
        [Ask("delta", "a", {POST: a}), Ask("delta", "t", {POST: b})],
        [Ask("delta", "t", {POST: b}), Ask("delta", "b", {POST: b})],
        [
            Ask("additive", "w", phase="prefill"),
            Ask("delta", "a", {POST: a}, phase="decode"),
            Ask("full", "b"),
        ],
        [
            Ask("delta", "b", {POST: a}, phase="prefill"),
            Ask("delta", "b", {POST: b}, phase="decode"),
        ],
    ]


def prompts_for(count: int) -> list[list[int]]:
    return [prompt(at, 4 + at % 6) for at in range(count)]


def run(llm: LLM, asked: list[list[Ask]], prompts: list[list[int]]) -> list[Greedy]:
    """The engine's answers to the requests, in one batch."""
    return generate(llm, prompts, [params(MAX_TOKENS, **specs(*a)) for a in asked])


def check(
    modules: Modules,
    found: list[Greedy],
    asked: list[list[Ask]],
    prompts: list[list[int]],
) -> None:
    """Compare every result with the oracle."""
    model = models.build(FAMILY)
    for result, asks, ids in zip(found, asked, prompts, strict=True):
        sites = modules.edits(*asks)
        expected = oracle.follow(model, ids, sites, result.tokens)
        assert_same(result, expected, f"{asks}")


def unit_clamps(one: DenseSAE, clamps: list[Clamp]) -> list[Clamp]:
    """Clamps given in units of the unit-norm decoder row, in the SAE's own."""
    norms = one.W_dec.norm(dim=1)
    return [
        Clamp(
            c.feature,
            c.kind,
            c.value if c.kind == "scale" else c.value / float(norms[c.feature]),
            c.only_if_active,
        )
        for c in clamps
    ]


def site_clamps(*clamps: Clamp) -> dict[Site, list[Clamp]]:
    return {POST: list(clamps)}
