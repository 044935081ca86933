# SPDX-License-Identifier: Apache-2.0
"""Additive, delta and full reconstruction together, on an engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from steering_testing import models, oracle
from steering_testing.engine import assert_same, engine, generate, params, runner
from steering_testing.reference import Clamp
from steering_testing.requests import Ask, Modules, prompt, specs, vector
from steering_testing.tiers import (
    D_SAE,
    FAMILY,
    MAX_TOKENS,
    POST,
    check,
    combinations,
    every_kind,
    prompts_for,
    run,
    save_modules,
    site_clamps,
    tier_modules,
    unit_clamps,
)

from vllm import LLM
from vllm.config.steering_points import HookPoint
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.layers.steering import SiteKey

pytestmark = pytest.mark.engine

MODULES = tier_modules()


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return save_modules(MODULES, tmp_path_factory.mktemp("tiers"))


@pytest.fixture(scope="module")
def llm(model_root: Path, paths: dict[str, Any]) -> Iterator[LLM]:
    with engine(FAMILY, model_root, paths) as llm:
        yield llm


def says(llm: LLM, asked: list[list[Ask]]) -> None:
    """The engine answers every request as the oracle does."""
    prompts = prompts_for(len(asked))
    check(MODULES, run(llm, asked, prompts), asked, prompts)


def test_tiers_modules_sites_and_phases_combine(llm: LLM) -> None:
    says(llm, combinations())


@pytest.mark.parametrize("module", ["a", "b", "t"])
def test_every_clamp_kind_and_condition(llm: LLM, module: str) -> None:
    """On features of which each token activates some, on one prompt."""
    features = range(0, D_SAE, 6)
    asked = [
        asks
        for tier in ("delta", "full")
        for asks in every_kind(tier, module, features)
    ]
    same = [prompt(4, 8)] * len(asked)
    found = run(llm, asked, same)
    check(MODULES, found, asked, same)
    distinct = {tuple(result.logprobs) for result in found}
    # Only of `scale` does the condition change nothing.
    assert len(distinct) == len(asked) - 2


def test_a_delta_topk_clamp_selects_over_all_features(llm: LLM) -> None:
    says(
        llm,
        [[Ask("delta", "t", site_clamps(Clamp(f, "scale", -3.0)))] for f in range(8)],
    )


def test_two_requests_use_two_saes_at_one_site(llm: LLM) -> None:
    asked = [[Ask("full", name)] for name in ("a", "b", "t", "identity")]
    same = [prompt(3, 7)] * 4
    found = run(llm, asked, same)
    check(MODULES, found, asked, same)
    assert len({tuple(result.logprobs) for result in found}) == 4


def test_delta_modules_run_in_registration_order(llm: LLM) -> None:
    """The order of the request's specs does not matter, that of the modules does."""
    a = Ask("delta", "a", site_clamps(*(Clamp(f, "scale", 6.0) for f in range(48))))
    b = Ask("delta", "b", site_clamps(*(Clamp(f, "scale", 6.0) for f in range(16))))
    same = [prompt(5, 9)] * 2
    one, other = run(llm, [[a, b], [b, a]], same)
    assert one == other
    check(MODULES, [one], [[a, b]], same[:1])
    sites = MODULES.edits(a, b)
    sites[POST].reverse()
    swapped = oracle.follow(models.build(FAMILY), same[0], sites, one.tokens)
    assert swapped.logprobs != pytest.approx(one.logprobs, abs=1e-3)


def test_unsteered_neighbours_are_bit_identical(llm: LLM) -> None:
    steered = combinations()
    prompts = prompts_for(2 * len(steered))
    plain = run(llm, [[] for _ in steered], prompts[::2])
    asked: list[list[Ask]] = []
    for asks in steered:
        asked += [[], asks]
    mixed = run(llm, asked, prompts)
    assert mixed[::2] == plain


@pytest.mark.parametrize("module", ["a", "b", "t"])
def test_a_delta_that_changes_nothing_is_the_plain_model(llm: LLM, module: str) -> None:
    clamps = [Clamp(4, "scale", 1.0), Clamp(50, "additive", 0.0)]
    same = [prompt(1, 8)] * 2
    plain, steered = run(llm, [[], [Ask("delta", module, site_clamps(*clamps))]], same)
    assert plain == steered


def test_an_identity_sae_is_the_plain_model(llm: LLM) -> None:
    same = [prompt(2, 8)] * 2
    plain, steered = run(llm, [[], [Ask("full", "identity")]], same)
    assert_same(steered, plain)


def test_full_equals_delta_where_the_error_is_zero(llm: LLM) -> None:
    clamps = site_clamps(Clamp(3, "absolute", 2.0), Clamp(70, "scale", -1.0))
    same = [prompt(2, 8)] * 2
    asked = [[Ask(tier, "identity", clamps)] for tier in ("delta", "full")]
    delta, full = run(llm, asked, same)
    assert_same(full, delta)
    check(MODULES, [full], asked[1:], same[1:])


def test_full_and_delta_add_the_same_direction(llm: LLM) -> None:
    """An additive clamp is a vector: before the plain stream's edit for delta, after
    the plain reconstruction for full, so the two differ by the SAE's error alone.

    On a prompt without bypassed tokens, since vectors have no bypass."""
    clamps = site_clamps(Clamp(8, "additive", 2.0))
    ids = prompt(6, 9)[1:]
    same = [ids] * 4
    delta, vector_there, full, vector_after = run(
        llm,
        [
            [Ask("delta", "a", clamps)],
            [Ask("additive", "dec_a", scale=2.0)],
            [Ask("full", "a", clamps)],
            [
                Ask("full", "a", site_clamps()),
                Ask("additive", "dec_a_next", scale=2.0),
            ],
        ],
        same,
    )
    assert_same(delta, vector_there)
    assert_same(full, vector_after)


def test_clamps_in_two_modules_compose(llm: LLM) -> None:
    ids = prompt(7, 9)[1:]
    both, vectors = run(
        llm,
        [
            [
                Ask("delta", "a", site_clamps(Clamp(8, "additive", 1.5))),
                Ask("delta", "b", site_clamps(Clamp(9, "additive", -2.0))),
            ],
            [
                Ask("additive", "dec_a", scale=1.5),
                Ask("additive", "dec_b", scale=-2.0),
            ],
        ],
        [ids] * 2,
    )
    assert_same(both, vectors)


@pytest.mark.parametrize("tier", ["delta", "full"])
def test_sixty_four_clamps_a_site_are_accepted_and_no_more(llm: LLM, tier: str) -> None:
    clamps = [Clamp(f, "additive", 0.1) for f in range(65)]
    says(llm, [[Ask(tier, "b", site_clamps(*clamps[:64]))]])
    key = {"delta": "sae_clamp_specs", "full": "sae_full_reconstruction_specs"}[tier]
    with pytest.raises(VLLMValidationError) as refusal:
        run(llm, [[Ask(tier, "b", site_clamps(*clamps))]], [prompt(0, 4)])
    assert f"{key}[0].clamps.post_block.1" in str(refusal.value)
    assert "found 65 clamps" in str(refusal.value)
    assert "at most 64" in str(refusal.value)


@pytest.mark.parametrize("tier", ["delta", "full"])
@pytest.mark.parametrize("module", ["unit", "unit_topk"])
def test_values_in_unit_decoder_units(llm: LLM, module: str, tier: str) -> None:
    """Absolute and additive values are coefficients on the unit-norm decoder row; the
    activations and the TopK selection are those of the SAE as shipped."""
    sae = MODULES.saes[module][POST]
    given = [
        Clamp(3, "absolute", 3.0),
        Clamp(90, "absolute", 3.0, True),
        Clamp(20, "additive", 2.0),
        Clamp(33, "scale", -1.5),
    ]
    ids = prompt(8, 9)
    [found] = run(llm, [[Ask(tier, module, site_clamps(*given))]], [ids])
    native = Ask(tier, module, site_clamps(*unit_clamps(sae, given)))
    check(MODULES, [found], [[native]], [ids])
    other = oracle.follow(
        models.build(FAMILY),
        ids,
        MODULES.edits(Ask(tier, module, site_clamps(*given))),
        found.tokens,
    )
    assert other.logprobs != pytest.approx(found.logprobs, abs=1e-3)


def test_a_delta_of_additive_clamps_never_pays_the_encoder(llm: LLM) -> None:
    ask = [Ask("delta", "b", site_clamps(Clamp(9, "additive", 1.0)))]
    ids = prompt(9, 9)
    site = runner(llm).steering.modules.sites[SiteKey(1, HookPoint.POST_BLOCK)]
    at = [name for name, sites in MODULES.saes.items() if POST in sites].index("b")
    encoder = site.saes[at].weights.W_enc
    kept = encoder.clone()
    before = run(llm, [ask], [ids])
    encoder.fill_(float("nan"))
    try:
        assert run(llm, [ask], [ids]) == before
    finally:
        encoder.copy_(kept)
    check(MODULES, before, [ask], [ids])


def test_a_gguf_control_vector_steers_as_the_same_safetensors(
    model_root: Path, tmp_path: Path
) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "w.gguf"
    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_uint32("controlvector.layer_count", 1)
    writer.add_tensor("direction.1", vector(3).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    modules = Modules(vectors={"w": {POST: vector(3)}})
    asked = [[Ask("additive", "w", scale=1.5)], []]
    prompts = prompts_for(2)
    with engine(FAMILY, model_root, {"w": str(path)}) as llm:
        check(modules, run(llm, asked, prompts), asked, prompts)


def test_a_compiled_engine_says_what_the_oracle_says(
    model_root: Path, paths: dict[str, Any]
) -> None:
    """Every tier at every site of the modules; and more clamps where configured."""
    many = [Clamp(f, "additive", 0.1) for f in range(D_SAE - 6)]
    asked = [*combinations(), [Ask("delta", "b", site_clamps(*many))], []]
    prompts = prompts_for(len(asked))
    settings = {"max_clamps": D_SAE - 6}
    with engine(FAMILY, model_root, paths, settings, enforce_eager=False) as llm:
        found = generate(
            llm, prompts, [params(MAX_TOKENS, **specs(*asks)) for asks in asked]
        )
        with pytest.raises(VLLMValidationError, match="at most 90"):
            more = [Clamp(f, "additive", 0.1) for f in range(D_SAE)]
            run(llm, [[Ask("delta", "b", site_clamps(*more))]], [prompt(0, 4)])
    check(MODULES, found, asked, prompts)
    assert torch.isfinite(torch.tensor([result.logprobs for result in found])).all()
