# SPDX-License-Identifier: Apache-2.0
"""What a step launches at a site of several modules: those that its requests use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from steering_testing import models
from steering_testing.engine import (
    DELTA,
    FULL,
    VECTORS,
    assert_same,
    engine,
    generate,
    params,
    runner,
    sae_spec,
)
from steering_testing.hot_modules import (
    CLAMPS,
    FAMILY,
    IDS,
    KINDS,
    SITE,
    SPARE,
    TOKENS,
    expected,
    save_modules,
    steered,
)

from vllm import LLM
from vllm.config.steering import Tier
from vllm.config.steering_points import HookPoint
from vllm.entrypoints.steering import register_module, unregister_module
from vllm.model_executor.layers import steering_capture, steering_reference
from vllm.model_executor.layers.steering import SiteKey

pytestmark = pytest.mark.engine
SAES = ("jumprelu", "topk", "other")


@pytest.fixture(scope="module")
def llm(model_root: Path, paths: dict[str, str]) -> Iterator[LLM]:
    modules = {name: paths[name] for name in (*SAES, "vector")}
    with engine(FAMILY, model_root, modules, {"spare": SPARE}) as llm:
        yield llm


@contextmanager
def launches(llm: LLM) -> Iterator[Counter[tuple[str, str]]]:
    """Counts what is computed at the site: (tier, module)."""
    modules = runner(llm).steering.modules
    key = SiteKey(SITE[0], HookPoint(SITE[1]))
    names = {id(modules.sae_slot(name, key)): name for name in SAES}
    found: Counter[tuple[str, str]] = Counter()
    functions = {
        "full": "full_reconstruction",
        "delta": "sae_clamp",
        "vectors": "steering_vectors",
    }
    with pytest.MonkeyPatch.context() as patch:
        for tier, name in functions.items():
            stock = getattr(steering_reference, name)

            def count(
                slot: Any, *args: Any, tier: str = tier, stock: Any = stock
            ) -> None:
                found[tier, names.get(id(slot), "another")] += 1
                stock(slot, *args)

            patch.setattr(steering_reference, name, count)
        yield found


def test_plain_requests_launch_nothing(llm: LLM) -> None:
    with launches(llm) as found:
        generate(llm, [IDS, IDS[:5]], [params(TOKENS)] * 2)
    assert not found


@pytest.mark.parametrize("module", SAES)
@pytest.mark.parametrize(("tier", "spec"), [("full", FULL), ("delta", DELTA)])
def test_a_module_is_launched_alone(
    llm: LLM, module: str, tier: str, spec: str
) -> None:
    with launches(llm) as found:
        (output,) = generate(llm, [IDS], [steered(module, spec)])
    assert_same(output, expected(KINDS[module], tier), module)
    assert found == {(tier, module): TOKENS}  # as many as steps


def test_what_ends_is_not_launched_any_more(llm: LLM) -> None:
    both = [*SAES[:2]]
    asks = [
        params(tokens, **{FULL: [sae_spec(name, {SITE: CLAMPS})]})
        for name, tokens in zip(both, (TOKENS, 2), strict=True)
    ]
    with launches(llm) as found:
        generate(llm, [IDS, IDS[::-1]], asks)
        generate(llm, [IDS], [params(3)])
    by_module = {module: count for (_, module), count in found.items()}
    assert by_module["jumprelu"] == TOKENS
    assert by_module["topk"] < TOKENS
    assert set(by_module) == set(both)


def test_vectors_and_new_modules_are_launched_when_used(
    llm: LLM, tmp_path: Path
) -> None:
    vector = {VECTORS: [{"module_name": "vector", "scale": 2.0}]}
    with launches(llm) as found:
        generate(llm, [IDS], [params(2, **vector)])
    assert {what for what, _ in found} == {"vectors"}
    paths = save_modules(tmp_path)
    register_module(llm, "new", paths["relu"])
    try:
        with launches(llm) as found:
            (output,) = generate(llm, [IDS], [steered("new")])
        assert_same(output, expected(KINDS["relu"]), "new")
        assert {module for _, module in found} == {"another"}
    finally:
        unregister_module(llm, "new")


def test_a_graph_holds_every_launch(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows are data that later steps write."""
    modules = runner(llm).steering.modules
    slot = modules.sae_slot("other", SiteKey(SITE[0], HookPoint(SITE[1])))
    x = torch.zeros(2, models.HIDDEN)
    generate(llm, [IDS], [params(1)])
    for table in (slot.full, slot.delta):
        assert not steering_capture.is_needed(table, modules.step, x)
    monkeypatch.setattr(steering_capture, "is_captured", lambda device: True)
    for table in (slot.full, slot.delta):
        assert steering_capture.is_needed(table, modules.step, x)
    tables = [t for tier in Tier for t in modules.tables(tier)]
    assert not any(bound.table.in_use for bound in tables)


def test_an_edit_that_begins_later_is_launched_then(llm: LLM) -> None:
    """Its rows are held from the first step on, and written when they are needed."""
    later = sae_spec("other", {SITE: CLAMPS}, spans=[("generated", 2, None)])
    with launches(llm) as found:
        (output,) = generate(llm, [IDS], [params(TOKENS, **{FULL: [later]})])
    assert set(found) == {("full", "other")}
    (plain,) = generate(llm, [IDS], [params(TOKENS)])
    assert output.tokens[:2] == plain.tokens[:2]
    assert output.tokens != plain.tokens
