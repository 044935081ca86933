# SPDX-License-Identifier: Apache-2.0
"""A change of modules is all or nothing over two ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from steering_testing import models, oracle
from steering_testing.engine import (
    FULL,
    assert_same,
    engine,
    generate,
    params,
    sae_spec,
    save_sae,
)
from steering_testing.reference import Edit, random_sae
from steering_testing.requests import prompt

from vllm.entrypoints.steering import SteeringModuleError, replace_module

pytestmark = pytest.mark.engine

SITE = (1, "post_block")
IDS = prompt(7, 20)


def poisoner() -> Any:
    """A function for the workers, which cannot import this file: it goes by value."""

    def poison(worker: Any) -> None:
        """Make the next copy into a slot fail, on the second rank only."""
        import vllm.v1.worker.steering_module_changes as hot

        if worker.rank != 1:
            return
        fill = hot._fill

        def fail(*args: Any) -> None:
            hot._fill = fill
            fill(*args)
            raise RuntimeError("injected")

        hot._fill = fail

    return poison


def load_breaker() -> Any:
    """As `poisoner`: the next load finds a bad file, on the second rank only."""

    def poison(worker: Any) -> None:
        from vllm.model_executor.model_loader.sae_inspector import ModuleInspector

        if worker.rank != 1:
            return
        load = ModuleInspector.load

        def fail(*args: Any) -> None:
            ModuleInspector.load = load
            raise ValueError("a bad file")

        ModuleInspector.load = fail

    return poison


@pytest.mark.parametrize(
    "sharding", ["replicate", pytest.param("shard", marks=pytest.mark.slow)]
)
def test_a_rank_that_fails_takes_all_ranks_back(
    sharding: str, model_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    saes = {
        kind: random_sae(96, models.HIDDEN, kind, 3) for kind in ("relu", "jumprelu")
    }
    paths = {}
    for kind, sae in saes.items():
        sae.skip_token_ids = (models.BOS, models.EOS, models.PAD)
        paths[kind] = save_sae(tmp_path / kind, {SITE: sae})
    spare = {"layer": 1, "hook": "resid_post", "width": 96, "sharding": sharding}
    steering = {"spare": [spare]}
    ask = params(6, **{FULL: [sae_spec("hot")]})

    def check(kind: str) -> None:
        edits = {SITE: [Edit("full", saes[kind])]}
        expected = oracle.greedy(models.build("llama"), IDS, edits, 6)
        assert_same(generate(llm, [IDS], [ask])[0], expected, kind)

    with engine("llama", model_root, {}, steering, tensor_parallel_size=2) as llm:
        replace_module(llm, "hot", paths["relu"])
        check("relu")
        llm.collective_rpc(poisoner())
        with pytest.raises(SteeringModuleError, match="injected") as caught:
            replace_module(llm, "hot", paths["jumprelu"])
        assert caught.value.status == 500
        check("relu")
        llm.collective_rpc(load_breaker())
        with pytest.raises(SteeringModuleError, match="a bad file; nothing") as caught:
            replace_module(llm, "hot", paths["jumprelu"])
        assert caught.value.status == 400
        check("relu")
        replace_module(llm, "hot", paths["jumprelu"])
        check("jumprelu")
