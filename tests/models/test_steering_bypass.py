# SPDX-License-Identifier: Apache-2.0
"""Skip sets and norm guard: tokens that the SAE tiers leave unchanged, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from steering_testing import models, oracle
from steering_testing.engine import engine, generate, params
from steering_testing.reference import Clamp
from steering_testing.requests import Ask, Modules, prompt, specs
from steering_testing.tiers import (
    CUSTOM_SKIP,
    FAMILY,
    POST,
    check,
    run,
    save_modules,
    site_clamps,
    tier_modules,
)

from vllm import LLM

pytestmark = pytest.mark.engine

NAMES = ("b", "skip_custom", "skip_none", "skip_all", "guard_some", "guard_all")
EVERYTHING = tier_modules()
MODULES = Modules({name: EVERYTHING.saes[name] for name in NAMES}, EVERYTHING.vectors)
TIERS = ["delta", "full"]
CLAMPS = site_clamps(Clamp(5, "absolute", 3.0), Clamp(11, "additive", 1.5))
# Every token of the custom set among others, bos in front.
MIXED = [models.BOS, 12, *CUSTOM_SKIP[:3], 50, 60, CUSTOM_SKIP[3], 70]


@pytest.fixture(scope="module")
def llm(model_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    paths = save_modules(EVERYTHING, tmp_path_factory.mktemp("bypass"))
    with engine(FAMILY, model_root, {name: paths[name] for name in NAMES}) as llm:
        yield llm


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("module", ["skip_all", "guard_all"])
def test_a_request_whose_tokens_all_bypass_is_the_plain_one(
    llm: LLM, module: str, tier: str
) -> None:
    same = [prompt(1, 9)] * 2
    plain, steered = run(llm, [[], [Ask(tier, module, CLAMPS)]], same)
    assert steered == plain


@pytest.mark.parametrize("tier", TIERS)
def test_bos_eos_and_pad_of_the_model_bypass_by_default(llm: LLM, tier: str) -> None:
    special = [models.BOS, models.EOS, models.PAD, models.BOS]
    ask = Ask(tier, "b", CLAMPS, phase="prefill")
    plain, steered, other = generate(
        llm,
        [special, special, special],
        [
            params(1),
            params(1, **specs(ask)),
            params(1, **specs(Ask(tier, "skip_none", CLAMPS, phase="prefill"))),
        ],
    )
    assert steered == plain
    assert other != plain


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("module", ["b", "skip_custom", "skip_none"])
def test_a_modules_own_set_says_which_tokens_bypass(
    llm: LLM, module: str, tier: str
) -> None:
    asked = [[Ask(tier, module, CLAMPS)]]
    found = run(llm, asked, [MIXED])
    check(MODULES, found, asked, [MIXED])


def test_two_modules_of_one_request_bypass_different_tokens(llm: LLM) -> None:
    asked = [[Ask("delta", "skip_custom", CLAMPS), Ask("full", "b", CLAMPS)]]
    check(MODULES, run(llm, asked, [MIXED]), asked, [MIXED])


def test_the_norm_guard_bypasses_large_tokens_only(llm: LLM) -> None:
    """The limit lies among the norms of these tokens, and the oracle agrees."""
    ids = prompt(4, 20)
    norms: list[float] = []
    model = models.build(FAMILY)
    layer = models.decoder_layers(model)[POST[0]]
    handle = layer.register_forward_hook(
        lambda module, args, out: norms.extend(
            (out[0] if isinstance(out, tuple) else out)[0].norm(dim=1).tolist()
        )
    )
    try:
        oracle.follow(model, ids, {}, [0])
    finally:
        handle.remove()
    limit = MODULES.saes["guard_some"][POST].norm_limit
    assert min(norms) < limit < max(norms), norms
    asked = [[Ask(tier, "guard_some", CLAMPS)] for tier in TIERS]
    check(MODULES, run(llm, asked, [ids] * 2), asked, [ids] * 2)
