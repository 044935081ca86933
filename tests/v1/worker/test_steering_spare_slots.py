# SPDX-License-Identifier: Apache-2.0
"""Slots of engines that start with spare ones, with none, or without steering."""

from __future__ import annotations

from pathlib import Path

import pytest
from steering_testing import models, oracle
from steering_testing.engine import (
    FULL,
    assert_same,
    engine,
    generate,
    params,
    runner,
    sae_spec,
    save_sae,
)
from steering_testing.hot_modules import (
    FAMILY,
    HOOK,
    IDS,
    KINDS,
    LAYER,
    SITE,
    SPARE,
    TOKENS,
    check,
)
from steering_testing.reference import Edit

from vllm.config.sae_features import features_json
from vllm.config.steering_json import Json
from vllm.engine.steering_active_config import active_steering_config
from vllm.entrypoints.steering import (
    SteeringModuleError,
    register_module,
    replace_module,
    unregister_module,
)

pytestmark = pytest.mark.engine


def test_an_eager_engine_makes_the_slots_it_lacks(
    model_root: Path, paths: dict[str, str], tmp_path: Path
) -> None:
    site = (0, "pre_attn")
    path = save_sae(tmp_path / "new", {site: KINDS["wide"], SITE: KINDS["wide"]})
    edits = {site: [Edit("full", KINDS["wide"])]}
    with engine(FAMILY, model_root, {"first": paths["other"]}) as llm:
        register_module(llm, "new", path)
        ask = params(TOKENS, **{FULL: [sae_spec("new", {site: []})]})
        (found,) = generate(llm, [IDS], [ask])
        assert_same(found, oracle.greedy(models.build(FAMILY), IDS, edits, TOKENS))
        check(llm, "first", KINDS["other"])
        unregister_module(llm, "new")
        register_module(llm, "new", path)
        assert len(runner(llm).steering.config.slots) == 3


def test_an_engine_can_start_with_spare_slots_only(
    model_root: Path, paths: dict[str, str]
) -> None:
    with engine(FAMILY, model_root, {}, {"spare": SPARE}) as llm:
        register_module(llm, "hot", paths["jumprelu"])
        check(llm, "hot", KINDS["jumprelu"])


def test_an_engine_without_steering_says_so(model_root: Path) -> None:
    with (
        engine(FAMILY, model_root, None) as llm,
        pytest.raises(
            SteeringModuleError,
            match="configure a module or a spare slot",
        ),
    ):
        register_module(llm, "hot", "nowhere")


def test_an_eager_engine_gives_the_memory_of_its_slots_back(
    model_root: Path, paths: dict[str, str], tmp_path: Path
) -> None:
    sites = {(0, "pre_attn"): KINDS["wide"], SITE: KINDS["wide"]}
    path = save_sae(tmp_path / "new", sites)
    spare = [{"layer": LAYER, "hook": HOOK, "width": 96}]
    with engine(FAMILY, model_root, {"first": paths["other"]}, {"spare": spare}) as llm:
        modules = runner(llm).steering.modules
        sizes = []
        for _ in range(3):
            register_module(llm, "hot", paths["jumprelu"])
            register_module(llm, "new", path)
            register_module(llm, "push", paths["vector"])
            replace_module(llm, "new", paths["relu"])
            unregister_module(llm, "hot")
            for name in ("new", "push"):
                unregister_module(llm, name)
            sizes.append(modules.nbytes)
        assert sizes[0] == sizes[1] == sizes[2]
        # Both start-up slots are there, and nothing else.
        assert sorted(modules.places) == [0, 1]
        config = active_steering_config(llm.llm_engine.vllm_config)
        assert config is not None
        assert [slot is not None for slot in config.slots] == [True, True]
        register_module(llm, "hot", paths["jumprelu"])
        check(llm, "hot", KINDS["jumprelu"])
        check(llm, "first", KINDS["other"])


def test_reading_goes_on_when_a_slot_that_was_read_is_gone(
    model_root: Path, paths: dict[str, str]
) -> None:
    with engine(FAMILY, model_root, {"first": paths["other"]}) as llm:

        def read(name: str) -> Json:
            spec = {"module_name": name, "top_k": 3}
            asked = params(TOKENS, sae_readout_specs=[spec])
            prompt = {"prompt_token_ids": IDS}
            (output,) = llm.generate([prompt], [asked], use_tqdm=False)
            return features_json(output.prompt_sae_features)

        before = read("first")
        assert before["first"]
        for name in ("jumprelu", "relu"):
            register_module(llm, name, paths[name])
            assert read(name)[name]
            assert len(runner(llm).steering.modules.places) == 2
            unregister_module(llm, name)
            assert len(runner(llm).steering.modules.places) == 1
            assert read("first") == before
        runner(llm).steering.check_integrity()
