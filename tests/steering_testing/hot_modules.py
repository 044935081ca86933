# SPDX-License-Identifier: Apache-2.0
"""Modules to register on a running engine, and what they should make of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from steering_testing import models, oracle
from steering_testing.engine import (
    DELTA,
    FULL,
    assert_same,
    generate,
    params,
    runner,
    sae_spec,
    save_sae,
)
from steering_testing.reference import Clamp, DenseSAE, Edit, random_sae
from steering_testing.requests import prompt, vector

from vllm import LLM
from vllm.entrypoints.steering import list_modules, unregister_module

FAMILY, LAYER, HOOK = "llama", 1, "post_block"
SITE = (LAYER, HOOK)
BLOCK = 32
CLAMPS = [Clamp(5, "absolute", 4.0), Clamp(9, "additive", 1.0, True)]
IDS = prompt(7, 40)
TOKENS = 8
KINDS = {
    "jumprelu": random_sae(96, models.HIDDEN, "jumprelu", 3),
    "topk": random_sae(64, models.HIDDEN, "topk", 4),
    "relu": random_sae(48, models.HIDDEN, "relu", 5),
    "other": random_sae(96, models.HIDDEN, "jumprelu", 6),
    "wide": random_sae(200, models.HIDDEN, "jumprelu", 8),
}
SPARE = [
    {"layer": LAYER, "hook": "resid_post", "width": 128, "count": 2},
    {"layer": LAYER, "hook": "resid_post", "vectors": 2},
]


def save_modules(root: Path) -> dict[str, str]:
    """Files of every kind and of a steering vector; their paths by name."""
    found = {name: save_sae(root / name, {SITE: sae}) for name, sae in KINDS.items()}
    save_file({f"layers.{LAYER}.{HOOK}": vector(1)}, root / "v.safetensors")
    found["vector"] = str(root / "v.safetensors")
    return found


def leave_only_the_first(llm: LLM) -> None:
    """Remove every module but "first", and check that no row is in use."""
    for name in list_modules(llm):
        if name != "first":
            unregister_module(llm, name)
    generate(llm, [prompt(999, 3)], [params(1)])
    runtime = runner(llm).steering
    runtime.check_integrity()
    assert all(m.rows_in_use == 0 for m in runtime.managers.values())


def steered(module: str, tier: str = FULL) -> Any:
    return params(TOKENS, **{tier: [sae_spec(module, {SITE: CLAMPS})]})


def expected(sae: DenseSAE, tier: str = "full") -> oracle.Greedy:
    edits = {SITE: [Edit(tier, sae, CLAMPS)]}
    return oracle.greedy(models.build(FAMILY), IDS, edits, TOKENS)


def check(llm: LLM, module: str, sae: DenseSAE) -> None:
    (full, delta) = generate(llm, [IDS, IDS], [steered(module), steered(module, DELTA)])
    assert_same(full, expected(sae), "full")
    assert_same(delta, expected(sae, "delta"), "delta")
