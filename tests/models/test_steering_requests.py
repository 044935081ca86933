# SPDX-License-Identifier: Apache-2.0
"""Conditions, directions and spans on an engine, against Hugging Face with hooks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from steering_testing.engine import engine, generate, params, runner
from steering_testing.reference import Clamp
from steering_testing.requests import Ask, prompt, specs
from steering_testing.tiers import (
    D_SAE,
    FAMILY,
    MAX_TOKENS,
    MID,
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
Spans = list[tuple[str, int, int | None]]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return save_modules(MODULES, tmp_path_factory.mktemp("requests"))


@pytest.fixture(scope="module")
def llm(model_root: Path, paths: dict[str, Any]) -> Iterator[LLM]:
    with engine(FAMILY, model_root, paths, block_size=BLOCK) as llm:
        yield llm


def conditional(module: str, tier: str, which: str) -> list[Ask]:
    """Clamps of which each token meets some, several on one condition."""
    conditions = [(f, which, 0.3) for f in range(5, D_SAE, 15)]
    clamps = [
        Clamp(f, kind, value, only, conditions[f % len(conditions)])
        for f, (kind, value, only) in zip(
            range(0, D_SAE, 6),
            [("absolute", 2.5, False), ("additive", 1.5, False), ("scale", -2.0, True)]
            * 6,
            strict=False,
        )
    ]
    return [Ask(tier, module, {POST: [*clamps, Clamp(1, "additive", 0.5)]})]


def directions() -> list[list[Ask]]:
    """Every kind of vector, alone and together with other tiers."""
    clamp = {POST: [Clamp(8, "absolute", 3.0)]}
    return [
        [Ask("additive", "v", kind="set", value=1.5)],
        [Ask("additive", "v", kind="set", value=0.25, relative=True)],
        [Ask("additive", "v", kind="scale", scale=0.0)],
        [Ask("additive", "v", kind="scale", scale=-1.5)],
        [Ask("additive", "w", kind="bound", bounds=(-0.1, 0.2))],
        [Ask("additive", "w", kind="bound", bounds=(-0.02, 0.01), relative=True)],
        [Ask("additive", "w", scale=0.4, relative=True)],
        [Ask("additive", "w", kind="bound", bounds=(-50.0, 50.0))],
        [
            Ask("additive", "v", kind="scale", scale=0.0),
            Ask("additive", "w", kind="bound", bounds=(0.0, 0.1)),
            Ask("additive", "dec_a", scale=0.7),
            Ask("delta", "a", clamp),
            Ask("full", "b", clamp),
        ],
        [
            Ask("additive", "v", kind="set", value=2.0, phase="prefill"),
            Ask("additive", "v", kind="scale", scale=0.0, phase="decode"),
        ],
    ]


def schedules() -> list[list[Ask]]:
    """Spans of prompt and answer, in every tier."""
    low, high = ({POST: [Clamp(8, "absolute", v)]} for v in (2.0, 5.0))

    def full(spans: Spans, clamps: Any = high, module: str = "a") -> Ask:
        return Ask("full", module, clamps, spans=spans)

    return [
        [full([("prompt", -1, None)])],
        [full([("prompt", 1, 3)])],
        [full([("prompt", -3, -1), ("generated", 1, 3)])],
        [full([("generated", 0, 2)], low), full([("generated", 2, None)])],
        [
            full([("prompt", 0, 2)], module="b"),
            full([("prompt", 2, None), ("generated", 0, 1)]),
        ],
        [
            Ask("delta", "a", low),
            Ask("delta", "b", high, spans=[("generated", 2, 4)]),
        ],
        [
            Ask("additive", "v", scale=1.0, spans=[("prompt", -2, None)]),
            Ask("additive", "v", scale=-0.5, spans=[("prompt", 0, 5)]),
            Ask("additive", "w", kind="scale", scale=0, spans=[("generated", 1, None)]),
            Ask("full", "b", {MID: [Clamp(9, "scale", 2.5)]}, phase="decode"),
        ],
        [full([("prompt", 100, 200)])],
        [full([("prompt", 0, None), ("generated", 0, None)])],
    ]


def everything() -> list[list[Ask]]:
    """One batch of all of it, with plain requests between."""
    mixed = [conditional("a", "delta", "above"), conditional("t", "full", "below")]
    asked: list[list[Ask]] = []
    for asks in (*mixed, *directions(), *schedules()):
        asked += [asks, []]
    return asked


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


def test_a_warm_cache_serves_equal_schedules_only(llm: LLM) -> None:
    """Twice in a row, and after every other schedule has filled the cache."""
    asked = schedules()
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


@pytest.mark.parametrize(
    "compiled", [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_chunks_and_preemption_change_nothing(
    model_root: Path, paths: dict[str, Any], compiled: bool
) -> None:
    """Few tokens a step, and a cache too small for the batch."""
    asked = everything()
    prompts = [prompt(at, BLOCK - 2 + at % 3) for at in range(len(asked))]
    options = {
        "max_num_batched_tokens": 24,
        "max_num_seqs": 8,
        "enable_prefix_caching": False,
        "num_gpu_blocks_override": 4,
        "block_size": BLOCK,
        "max_model_len": 64,
        "enforce_eager": not compiled,
    }
    with engine(FAMILY, model_root, paths, **options) as llm:
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        preempt = Mock(wraps=scheduler._preempt_request)
        scheduler._preempt_request = preempt
        found = generate(
            llm, prompts, [params(MAX_TOKENS, **specs(*asks)) for asks in asked]
        )
        runner(llm).steering.check_integrity()
    assert preempt.call_count > 3
    check(MODULES, found, asked, prompts)
