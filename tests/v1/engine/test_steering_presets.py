# SPDX-License-Identifier: Apache-2.0
"""Presets on an engine: chosen by a request, or the default of all of them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from steering_testing import models, oracle
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
    save_sae,
    squeezed,
)
from steering_testing.oracle import Greedy
from steering_testing.reference import Clamp
from steering_testing.requests import Ask, Modules, prompt, specs, vector
from steering_testing.tiers import FAMILY, POST, PRE, sae

from vllm import LLM, SamplingParams
from vllm.config.sae_steering_types import SteeringSamplingParams
from vllm.config.steering_checks import SteeringConfigError
from vllm.entrypoints.steering import (
    SteeringModuleError,
    delete_preset,
    list_modules,
    put_preset,
    register_module,
    register_vector,
    replace_module,
    set_default_preset,
    unregister_module,
)
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import BeamSearchParams

pytestmark = pytest.mark.engine

MODULES = Modules(
    {"a": {POST: sae("jumprelu", 1)}, "b": {POST: sae("relu", 3)}},
    {"v": {POST: vector(1)}},
)
BRIDGE = [Ask("full", "a", {POST: [Clamp(8, "absolute", 4.0)]})]
CALM = [
    Ask("delta", "b", {POST: [Clamp(9, "additive", 3.0), Clamp(2, "scale", 3.0)]}),
    Ask("additive", "v", scale=0.8, phase="decode"),
]
TOKENS = 6


@pytest.fixture(scope="module")
def llm(model_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    root = tmp_path_factory.mktemp("presets")
    file = root / "bridge.json"
    hints = {"temperature": 0.25, "max_tokens": 7}
    file.write_text(json.dumps({**specs(*BRIDGE), "sampling": hints}))
    steering = {"presets": {"bridge": str(file), "calm": specs(*CALM)}}
    spare = [{"layer": 1, "hook": "post_block", "vectors": 1}]
    steering |= {"spare": spare}
    with engine(FAMILY, model_root, MODULES.save(root), steering) as llm:
        yield llm


@pytest.fixture(autouse=True)
def no_default(llm: LLM) -> Iterator[None]:
    yield
    set_default_preset(llm, None)


def ask(llm: LLM, *extra_args: dict[str, Any], seed: int = 4) -> list[Greedy]:
    prompts = [prompt(seed, 9)] * len(extra_args)
    return generate(llm, prompts, [params(TOKENS, **args) for args in extra_args])


def check(found: Greedy, asks: list[Ask], seed: int = 4) -> None:
    model = models.build(FAMILY)
    expected = oracle.follow(model, prompt(seed, 9), MODULES.edits(*asks), found.tokens)
    assert_same(found, expected, f"{asks}")


def test_a_request_runs_under_the_preset_that_it_names(llm: LLM) -> None:
    found = ask(llm, {"steering_preset": "bridge"}, {}, {"steering_preset": "calm"}, {})
    for result, asks in zip(found, ([*BRIDGE], [], [*CALM], []), strict=True):
        check(result, asks)


def test_sampling_params_take_a_preset(llm: LLM) -> None:
    one = SteeringSamplingParams(
        max_tokens=TOKENS, temperature=0, logprobs=0, steering_preset="bridge"
    )
    assert one.extra_args == {"steering_preset": "bridge"}
    [by_params] = generate(llm, [prompt(4, 9)], [one])
    assert [by_params] == ask(llm, {"steering_preset": "bridge"})


def test_a_requests_own_entry_wins(llm: LLM) -> None:
    own = Ask("delta", "b", {POST: [Clamp(9, "additive", -3.0)]})
    [found] = ask(llm, {"steering_preset": "calm", **specs(own)})
    check(
        found,
        [
            Ask(
                "delta",
                "b",
                {POST: [Clamp(9, "additive", -3.0), Clamp(2, "scale", 3.0)]},
            ),
            CALM[1],
        ],
    )
    other = Ask("full", "b", {POST: []})
    [found] = ask(llm, {"steering_preset": "bridge", **specs(other)})
    check(found, [other])


def test_specs_elsewhere_are_added_to_the_preset(llm: LLM) -> None:
    own = Ask("full", "a", {POST: [Clamp(8, "absolute", 4.0)]})
    [found] = ask(llm, {"steering_preset": "calm", **specs(own)})
    check(found, [*CALM, own])


def test_the_default_preset_steers_every_request_that_names_none(llm: LLM) -> None:
    before = ask(llm, {}, {})
    set_default_preset(llm, "calm")
    found = ask(
        llm, {}, {"steering_preset": None}, {"steering_preset": "bridge"}, {"mine": 1}
    )
    for result, asks in zip(found, (CALM, [], BRIDGE, CALM), strict=True):
        check(result, asks)
    set_default_preset(llm, None)
    assert ask(llm, {}, {}) == before


def test_params_without_extra_args_run_under_the_default(llm: LLM) -> None:
    set_default_preset(llm, "calm")
    [by_default] = ask(llm, {})
    set_default_preset(llm, None)
    [by_name] = ask(llm, {"steering_preset": "calm"})
    assert by_default == by_name


def test_a_request_that_waits_keeps_the_default_that_it_arrived_under(
    llm: LLM,
) -> None:
    """A change of the default does not affect requests that the engine has."""
    set_default_preset(llm, "calm")
    sampling = params(TOKENS)
    llm.llm_engine.add_request("r", {"prompt_token_ids": prompt(4, 9)}, sampling)
    set_default_preset(llm, None)
    tokens: list[int] = []
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            tokens = list(output.outputs[0].token_ids)
    assert [tokens] == [
        result.tokens for result in ask(llm, {"steering_preset": "calm"})
    ]


def test_a_default_needs_no_reset_of_the_prefix_cache(llm: LLM) -> None:
    ids = prompt(5, 200)

    def cached() -> int:
        inputs = [{"prompt_token_ids": ids}]
        (output,) = llm.generate(inputs, params(1), use_tqdm=False)
        return output.num_cached_tokens or 0

    assert cached() == 0
    whole = cached()
    assert whole > 0
    set_default_preset(llm, "bridge")
    assert cached() == 0
    assert cached() == whole
    set_default_preset(llm, None)
    assert cached() == whole


def test_a_locked_preset_is_neither_left_nor_changed(llm: LLM) -> None:
    put_preset(llm, "locked", {**specs(*CALM), "locked": True})
    set_default_preset(llm, "locked")
    own = specs(Ask("delta", "b", {POST: [Clamp(9, "additive", -3.0)]}))
    for refused in ({"steering_preset": None}, {"steering_preset": "bridge"}, own):
        with pytest.raises(VLLMValidationError, match="locked") as caught:
            ask(llm, refused)
        assert caught.value.parameter == "steering_preset"
    elsewhere = Ask("full", "a", {POST: [Clamp(8, "absolute", 4.0)]})
    [found] = ask(llm, specs(elsewhere))
    check(found, [*CALM, elsewhere])
    with pytest.raises(SteeringModuleError, match="default"):
        delete_preset(llm, "locked")
    set_default_preset(llm, None)
    delete_preset(llm, "locked")


@pytest.mark.parametrize(
    ("preset", "what"),
    [
        ({}, "no specs"),
        ([], "found a list"),
        ({DELTA: [sae_spec("none")]}, "sae_clamp_specs[0].module_name"),
        ({**specs(*CALM), "lock": True}, "preset.lock: unknown field"),
        ({**specs(*CALM), "sampling": {"temperature": "hot"}}, "temperature"),
        ({**specs(*CALM), "sampling": {"temperature": float("nan")}}, "found nan"),
        ({**specs(*CALM), "sampling": {"temperature": 2.5}}, "a number in 0..2"),
        ({**specs(*CALM), "sampling": {"top_p": 0}}, "above 0, at most 1"),
        ({**specs(*CALM), "sampling": {"repetition_penalty": float("inf")}}, "inf"),
        ({**specs(*CALM), "sampling": {"max_tokens": 0}}, "1 or more"),
        ({**specs(*CALM), "description": "\ud800"}, "preset.description"),
        ({FULL: sae_spec("a")}, "enclose it in [...]"),
    ],
)
def test_a_bad_preset_is_refused_when_it_is_made(
    llm: LLM, preset: Any, what: str
) -> None:
    with pytest.raises(SteeringModuleError) as caught:
        put_preset(llm, "bad", preset)
    assert what in str(caught.value)
    with pytest.raises(VLLMValidationError, match="'bridge', 'calm'"):
        ask(llm, {"steering_preset": "bad"})


def test_offline_beam_search_under_a_default_is_refused(llm: LLM) -> None:
    params = BeamSearchParams(beam_width=2, max_tokens=2)
    set_default_preset(llm, "calm")
    with pytest.raises(VLLMValidationError, match="expected no default preset"):
        llm.beam_search([{"prompt_token_ids": prompt(4, 9)}], params)


def test_files_of_a_notebooks_vector_go_with_its_module(
    llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for at in range(3):
        tensors = {"post_block.1": vector(at)}
        register_vector(llm, "notebook", tensors, replace=at > 0)
        assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(SteeringModuleError, match="already registered"):
        register_vector(llm, "notebook", tensors)
    (folder,) = tmp_path.iterdir()
    assert list_modules(llm)["notebook"].path == f"{folder}/vectors.safetensors"
    unregister_module(llm, "notebook")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("array", [False, True])
def test_a_tensor_of_a_notebook_is_a_vector_module(llm: LLM, array: bool) -> None:
    direction = vector(7).requires_grad_()
    given = direction.detach().numpy() if array else direction
    register_vector(llm, "notebook", {"post_block.1": given})
    try:
        ablate = {"module_name": "notebook", "kind": "scale", "scale": 0}
        [found] = ask(llm, {VECTORS: [ablate]})
        own = Modules(vectors={"notebook": {POST: direction.detach()}})
        edits = own.edits(Ask("additive", "notebook", kind="scale", scale=0.0))
        model = models.build(FAMILY)
        assert_same(found, oracle.follow(model, prompt(4, 9), edits, found.tokens))
    finally:
        unregister_module(llm, "notebook")
    for vectors, message in (
        ({"nowhere": direction}, "vectors: found the site 'nowhere', expected HOOK"),
        ({"post_block.1": [1.0, 2.0]}, "vectors.post_block.1: found a list, expected"),
        ({"post_block.1": np.array(["a"])}, "vectors.post_block.1: found a ndarray"),
        (direction, r"vectors: found a Tensor \[.*\] of torch.float32, expected sites"),
    ):
        with pytest.raises(ValueError, match=message):
            register_vector(llm, "notebook", vectors)  # type: ignore[arg-type]


def test_a_bad_option_is_named_as_the_caller_wrote_it(llm: LLM) -> None:
    for option, field, message in (
        ({"feature_units": "unit"}, "feature_units", "feature_units: found 'unit'"),
        ({"feature_unit": "native"}, None, "unknown field 'feature_unit', expected"),
    ):
        with pytest.raises(SteeringModuleError, match=f"^{message}") as caught:
            register_module(llm, "sea", "/srv/sea", **option)  # type: ignore[arg-type]
        assert caught.value.field == field


def test_reserved_keys_are_refused(llm: LLM) -> None:
    with pytest.raises(VLLMValidationError, match="reserved"):
        generate(
            llm,
            [prompt(4, 9)],
            [SamplingParams(extra_args={"steering_expanded": True})],
        )


# Engines of their own, which end the distributed state of the one above.


def test_a_preset_whose_module_is_gone_says_so(
    model_root: Path, tmp_path: Path
) -> None:
    paths = MODULES.save(tmp_path)
    steering = {"presets": {"bridge": specs(*BRIDGE)}, "default_preset": "bridge"}
    with engine(FAMILY, model_root, paths, steering) as llm:
        check(ask(llm, {})[0], BRIDGE)
        with pytest.raises(SteeringModuleError, match="default preset 'bridge'"):
            unregister_module(llm, "a")
        elsewhere = save_sae(tmp_path / "elsewhere", {PRE: sae("jumprelu", 2)})
        with pytest.raises(SteeringModuleError, match="would not be valid: .*layer 1"):
            replace_module(llm, "a", elsewhere)
        check(ask(llm, {})[0], BRIDGE)
        set_default_preset(llm, None)
        unregister_module(llm, "a")
        with pytest.raises(
            VLLMValidationError, match="'bridge' cannot be used"
        ) as caught:
            ask(llm, {"steering_preset": "bridge"})
        assert caught.value.parameter == "steering_preset"
        with pytest.raises(SteeringModuleError, match="not valid now"):
            set_default_preset(llm, "bridge")
        check(ask(llm, {})[0], [])


@pytest.mark.parametrize(
    ("steering", "what"),
    [
        ({"presets": {"p": {DELTA: [sae_spec("none")]}}}, "steering.presets.p: "),
        (
            {"presets": {"p": "/no/such/file"}},
            "JSON file: No such file or directory, expected",
        ),
        ({"presets": {"a/b": {}}}, "letters, digits"),
        ({"default_preset": "p"}, "steering.default_preset: "),
    ],
)
def test_a_bad_preset_stops_start_up(
    model_root: Path, tmp_path: Path, steering: dict[str, Any], what: str
) -> None:
    paths = MODULES.save(tmp_path)
    with (
        pytest.raises(SteeringConfigError, match=what),
        engine(FAMILY, model_root, paths, steering),
    ):
        pass


@pytest.mark.parametrize(
    "compiled", [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_chunks_and_preemption_change_nothing_under_a_default(
    model_root: Path, tmp_path: Path, compiled: bool
) -> None:
    """Few tokens a step, a cache too small for the batch, every way to a preset."""
    presets = {"bridge": specs(*BRIDGE), "calm": specs(*CALM)}
    own = Ask("full", "a", {POST: [Clamp(8, "absolute", 4.0)]})
    last = Ask("additive", "v", kind="scale", scale=0.0, spans=[("prompt", -1, None)])
    ways: list[tuple[dict[str, Any], list[Ask] | None]] = [
        ({}, None),
        ({"steering_preset": "bridge"}, BRIDGE),
        ({"steering_preset": None}, []),
        ({"steering_preset": "calm", **specs(own)}, [*CALM, own]),
        ({"steering_preset": "bridge", **specs(last)}, [*BRIDGE, last]),
    ]
    options = {"block_size": 32, "enforce_eager": not compiled}
    paths, model = MODULES.save(tmp_path), models.build(FAMILY)
    with squeezed(FAMILY, model_root, paths, {"presets": presets}, **options) as llm:
        for default, wanted in (("bridge", BRIDGE), ("calm", CALM)):
            set_default_preset(llm, default)
            asked = [(given, wanted if a is None else a) for given, a in ways * 2]
            prompts = [prompt(at, 30 + at % 3) for at in range(len(asked))]
            sampling = [params(TOKENS, **given) for given, _ in asked]
            found = generate(llm, prompts, sampling)
            for result, ids, (given, asks) in zip(found, prompts, asked, strict=True):
                edits = MODULES.edits(*asks)
                expected = oracle.follow(model, ids, edits, result.tokens)
                assert_same(result, expected, f"{default}: {given}")
        runner(llm).steering.check_integrity()
