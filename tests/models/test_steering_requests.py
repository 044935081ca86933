# SPDX-License-Identifier: Apache-2.0
"""Conditions, directions and spans on an engine, against Hugging Face with hooks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from steering_testing.asks import conditional, directions, everything, schedules
from steering_testing.engine import engine, generate, params, runner, squeezed
from steering_testing.reference import Clamp
from steering_testing.requests import Ask, prompt, specs
from steering_testing.tiers import (
    FAMILY,
    MAX_TOKENS,
    POST,
    check,
    prompts_for,
    run,
    save_modules,
    tier_modules,
)

from vllm import LLM

pytestmark = pytest.mark.engine

MODULES = tier_modules()
BLOCK = 32


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return save_modules(MODULES, tmp_path_factory.mktemp("requests"))


@pytest.fixture(scope="module")
def llm(model_root: Path, paths: dict[str, Any]) -> Iterator[LLM]:
    with engine(FAMILY, model_root, paths, block_size=BLOCK) as llm:
        yield llm


def conditions() -> list[list[Ask]]:
    """Conditions above and below, of ReLU, JumpReLU and TopK, in both SAE tiers."""
    return [
        conditional(module, tier, which)
        for module in ("a", "b", "t")
        for tier in ("delta", "full")
        for which in ("above", "below")
    ]


@pytest.mark.parametrize("module", ["a", "b", "t"])
def test_conditions_of_every_kind_and_activation(llm: LLM, module: str) -> None:
    asked = [
        conditional(module, tier, which)
        for tier in ("delta", "full")
        for which in ("above", "below")
    ]
    same = [prompt(4, 8)] * len(asked)
    found = run(llm, asked, same)
    check(MODULES, found, asked, same)
    assert len({tuple(result.logprobs) for result in found}) == len(asked)


@pytest.mark.parametrize("tier", ["delta", "full"])
def test_a_condition_is_in_the_units_of_its_module(llm: LLM, tier: str) -> None:
    """A bound on the unit-norm decoder row's coefficient, between two activations."""
    one = MODULES.saes["unit"][POST]
    norms = one.W_dec.norm(dim=1)
    ids = prompt(4, 8)

    def ask(bound: float) -> list[Ask]:
        when = (3, "above", bound)
        return [Ask(tier, "unit", {POST: [Clamp(8, "additive", 3.0, when=when)]})]

    def native(bound: float) -> list[Ask]:
        when = (3, "above", bound / float(norms[3]))
        value = 3.0 / float(norms[8])
        return [Ask(tier, "unit", {POST: [Clamp(8, "additive", value, when=when)]})]

    bounds = [-1.0, 0.05, 0.1, 0.3, 1e9]
    found = run(llm, [ask(bound) for bound in bounds], [ids] * len(bounds))
    check(MODULES, found, [native(b) for b in bounds], [ids] * len(bounds))
    assert len({tuple(result.logprobs) for result in found}) > 1


def test_vectors_of_every_kind(llm: LLM) -> None:
    asked = directions()
    same = [prompt(4, 8)] * len(asked)
    found = run(llm, asked, same)
    check(MODULES, found, asked, same)
    distinct = {tuple(result.logprobs) for result in found}
    assert len(distinct) == len(asked)


def test_a_wide_bound_is_the_plain_model(llm: LLM) -> None:
    wide = [Ask("additive", "w", kind="bound", bounds=(-1e9, 1e9))]
    plain, bounded = run(llm, [[], wide], [prompt(2, 8)] * 2)
    assert plain == bounded


def test_spans_of_prompt_and_answer(llm: LLM) -> None:
    asked = schedules()
    same = [prompt(4, 8)] * len(asked)
    check(MODULES, run(llm, asked, same), asked, same)


def test_a_mixed_batch_leaves_plain_requests_as_they_are(llm: LLM) -> None:
    asked = everything()
    prompts = prompts_for(len(asked))
    plain = run(llm, [[]] * (len(asked) // 2), prompts[1::2])
    found = run(llm, asked, prompts)
    check(MODULES, found, asked, prompts)
    assert found[1::2] == plain


def test_a_warm_cache_serves_equal_edits_only(llm: LLM) -> None:
    """Twice in a row, and after every other request has filled the cache."""
    asked = [*conditions(), *directions(), *schedules()]
    same = [prompt(6, 40)] * len(asked)
    first = run(llm, asked, same)
    check(MODULES, first, asked, same)
    assert run(llm, asked, same) == pytest.approx(first, abs=1e-4)


def cached(llm: LLM, asks: list[Ask], ids: list[int]) -> int:
    (output,) = llm.generate(
        [{"prompt_token_ids": ids}], [params(2, **specs(*asks))], use_tqdm=False
    )
    return output.num_cached_tokens or 0


def test_blocks_before_a_span_are_those_of_a_plain_request(llm: LLM) -> None:
    """Blocks before the first span are shared with plain requests."""
    llm.reset_prefix_cache()
    ids = prompt(7, 3 * BLOCK + 1)
    assert cached(llm, [], ids) == 0
    last = [Ask("full", "a", spans=[("prompt", 2 * BLOCK, None)])]
    assert cached(llm, last, ids) == 2 * BLOCK
    assert cached(llm, last, ids) == 3 * BLOCK
    assert cached(llm, [], ids) == 3 * BLOCK
    other = [Ask("full", "b", spans=[("prompt", 2 * BLOCK, None)])]
    assert cached(llm, other, ids) == 2 * BLOCK


def test_without_a_reserve_there_is_no_room_for_vectors_of_requests(llm: LLM) -> None:
    modules = runner(llm).steering.modules
    assert not modules.inline.stacks
    for key, site in modules.sites.items():
        place = (key.layer, key.hook.value)
        named = sum(place in sites for sites in MODULES.vectors.values())
        found = 0 if site.vectors is None else site.vectors.directions.shape[0]
        assert found == named


@pytest.mark.parametrize(
    "compiled", [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_chunks_and_preemption_change_nothing(
    model_root: Path, paths: dict[str, Any], compiled: bool
) -> None:
    """Few tokens a step, and a cache too small for the batch."""
    asked = everything()
    prompts = [prompt(at, BLOCK - 2 + at % 3) for at in range(len(asked))]
    options = {"block_size": BLOCK, "enforce_eager": not compiled}
    with squeezed(FAMILY, model_root, paths, **options) as llm:
        found = generate(
            llm, prompts, [params(MAX_TOKENS, **specs(*asks)) for asks in asked]
        )
        runner(llm).steering.check_integrity()
    check(MODULES, found, asked, prompts)
