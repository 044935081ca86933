# SPDX-License-Identifier: Apache-2.0
"""Steering while the engine sleeps, and after the model got new weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from steering_testing import models, oracle
from steering_testing.engine import (
    FULL,
    TRACED,
    assert_same,
    engine,
    generate,
    params,
    runner,
    sae_spec,
    save_sae,
)
from steering_testing.reference import Clamp, Edit, random_sae
from steering_testing.requests import prompt

from vllm import LLM
from vllm.config.steering_replies import METHOD
from vllm.entrypoints.steering import (
    SteeringModuleError,
    list_modules,
    put_preset,
    register_module,
    unregister_module,
)

pytestmark = pytest.mark.engine

FAMILY, SITE = "llama", (1, "post_block")
SAE = random_sae(96, models.HIDDEN, "jumprelu", 3)
CLAMPS = [Clamp(5, "absolute", 4.0)]
IDS = prompt(7, 20)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_sae(tmp_path_factory.mktemp("sae") / "m", {SITE: SAE})


@pytest.fixture(scope="module", params=["eager", "compiled"])
def llm(request: pytest.FixtureRequest, model_root: Path, path: str) -> Iterator[LLM]:
    options = TRACED if request.param == "compiled" else {}
    spare = {"spare": [{"layer": 1, "hook": "resid_post", "width": 96}]}
    with engine(FAMILY, model_root, {"m": path}, spare, **options) as llm:
        yield llm


def check(llm: LLM, seed: int, name: str = "m") -> None:
    llm.reset_prefix_cache()
    (found,) = generate(
        llm, [IDS], [params(6, **{FULL: [sae_spec(name, {SITE: CLAMPS})]})]
    )
    edits = {SITE: [Edit("full", SAE, CLAMPS)]}
    expected = oracle.follow(models.build(FAMILY, seed), IDS, edits, found.tokens)
    assert_same(found, expected, f"model {seed}")


def test_modules_do_not_change_while_the_engine_sleeps(llm: LLM, path: str) -> None:
    def stats() -> dict:
        (reply,) = llm.collective_rpc(METHOD, args=("stats", {}))
        return reply.stats

    before = stats()
    llm.sleep(level=1)
    try:
        # What is asked of the workers' memory is answered from what was known.
        assert stats() == before
        assert list(list_modules(llm)) == ["m"]
        put_preset(llm, "calm", {FULL: [{"module_name": "m"}]})
        for change in (
            lambda: register_module(llm, "hot", path),
            lambda: unregister_module(llm, "m"),
        ):
            with pytest.raises(SteeringModuleError, match="asleep") as caught:
                change()
            assert caught.value.status == 409
    finally:
        llm.wake_up()
    register_module(llm, "hot", path)
    check(llm, 0, "hot")
    unregister_module(llm, "hot")


def test_steering_stays_where_it_is_when_the_model_gets_new_weights(
    llm: LLM, model_root: Path
) -> None:
    sites = runner(llm).steering.modules.sites.values()

    def addresses() -> list[int]:
        return [b.data_ptr() for site in sites for b in site.buffers()]

    before = addresses()
    other = str(models.save(FAMILY, model_root, seed=1))
    check(llm, 0)
    llm.collective_rpc("reload_weights", kwargs={"weights_path": other})
    check(llm, 1)
    weights = list(models.build(FAMILY, 0).state_dict().items())
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
    check(llm, 0)
    assert addresses() == before
