# SPDX-License-Identifier: Apache-2.0
"""Modules that are registered, replaced and removed on a running engine."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from steering_testing import models, oracle
from steering_testing.engine import (
    DELTA,
    TRACED,
    VECTORS,
    assert_same,
    engine,
    generate,
    params,
    runner,
    sae_spec,
    save_sae,
)
from steering_testing.hot_modules import (
    BLOCK,
    CLAMPS,
    FAMILY,
    IDS,
    KINDS,
    SITE,
    SPARE,
    TOKENS,
    check,
    leave_only_the_first,
    steered,
)
from steering_testing.reference import Edit, random_sae
from steering_testing.requests import vector

from vllm import LLM
from vllm.config.steering_replies import METHOD, Outcome
from vllm.entrypoints.steering import (
    SteeringModuleError,
    list_modules,
    register_module,
    replace_module,
    unregister_module,
)
from vllm.exceptions import VLLMValidationError
from vllm.v1.worker.steering_module_changes import ModuleChanges
from vllm.v1.worker.steering_places import SAEPlace

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module", params=["eager", "compiled"])
def llm(
    request: pytest.FixtureRequest, model_root: Path, paths: dict[str, str]
) -> Iterator[LLM]:
    options = TRACED if request.param == "compiled" else {}
    with engine(
        FAMILY,
        model_root,
        {"first": paths["other"]},
        {"spare": SPARE},
        block_size=BLOCK,
        **options,
    ) as llm:
        yield llm


@pytest.fixture(autouse=True)
def only_the_first_module_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "llm" in request.fixturenames:
        leave_only_the_first(request.getfixturevalue("llm"))


@pytest.mark.parametrize("kind", ["jumprelu", "topk", "relu"])
def test_a_spare_slot_takes_any_activation(
    llm: LLM, paths: dict[str, str], kind: str
) -> None:
    register_module(llm, "hot", paths[kind])
    check(llm, "hot", KINDS[kind])
    check(llm, "first", KINDS["other"])


def test_buffers_stay_where_they_are(llm: LLM, paths: dict[str, str]) -> None:
    sites = runner(llm).steering.modules.sites

    def addresses() -> list[int]:
        # No graph contains the launch that counts bypassed tokens.
        return [
            buffer.data_ptr()
            for site in sites.values()
            for name, buffer in site.named_buffers()
            if "bypass." not in name
        ]

    before = addresses()
    register_module(llm, "hot", paths["jumprelu"])
    replace_module(llm, "hot", paths["topk"])
    unregister_module(llm, "hot")
    assert addresses() == before


def test_a_replaced_module_serves_its_new_weights(
    llm: LLM, paths: dict[str, str]
) -> None:
    register_module(llm, "hot", paths["jumprelu"])
    check(llm, "hot", KINDS["jumprelu"])
    replace_module(llm, "hot", paths["topk"])
    check(llm, "hot", KINDS["topk"])


def test_a_vector_takes_a_spare_row(llm: LLM, paths: dict[str, str]) -> None:
    register_module(llm, "push", paths["vector"])
    ask = params(TOKENS, **{VECTORS: [{"module_name": "push", "scale": 1.5}]})
    (found,) = generate(llm, [IDS], [ask])
    edits = {SITE: [Edit("additive", vector=vector(1).double(), scale=1.5)]}
    assert_same(found, oracle.greedy(models.build(FAMILY), IDS, edits, TOKENS))


def test_replacing_needs_no_cache_reset(llm: LLM, paths: dict[str, str]) -> None:
    register_module(llm, "hot", paths["jumprelu"])
    ask = steered("hot")
    generate(llm, [IDS], [ask])
    (again,) = llm.generate([{"prompt_token_ids": IDS}], ask, use_tqdm=False)
    assert again.num_cached_tokens == BLOCK
    replace_module(llm, "hot", paths["other"])
    (fresh,) = llm.generate([{"prompt_token_ids": IDS}], ask, use_tqdm=False)
    assert fresh.num_cached_tokens == 0
    replace_module(llm, "hot", paths["jumprelu"])
    (back,) = llm.generate([{"prompt_token_ids": IDS}], ask, use_tqdm=False)
    assert back.num_cached_tokens == BLOCK
    check(llm, "hot", KINDS["jumprelu"])


def test_slots_run_in_the_order_that_the_cache_key_states(
    llm: LLM, paths: dict[str, str]
) -> None:
    both = params(
        TOKENS,
        **{DELTA: [sae_spec(name, {SITE: CLAMPS}) for name in ("a", "b")]},
    )

    def run(order: list[str]) -> tuple[Any, int]:
        saes = {"a": "jumprelu", "b": "topk"}
        for name in order:
            register_module(llm, name, paths[saes[name]])
        (cold,) = llm.generate([{"prompt_token_ids": IDS}], both, use_tqdm=False)
        for name in order:
            unregister_module(llm, name)
        return cold.outputs[0].token_ids, cold.num_cached_tokens

    first, _ = run(["a", "b"])
    _, cached = run(["b", "a"])
    assert cached == 0
    again, cached = run(["a", "b"])
    assert cached == BLOCK
    assert again == first


def test_a_removed_module_is_refused_by_name(llm: LLM, paths: dict[str, str]) -> None:
    register_module(llm, "hot", paths["jumprelu"])
    unregister_module(llm, "hot")
    with pytest.raises(VLLMValidationError, match="'hot'"):
        generate(llm, [IDS], [steered("hot")])


def test_a_name_is_not_taken_twice(llm: LLM, paths: dict[str, str]) -> None:
    with pytest.raises(SteeringModuleError, match="replace=true") as caught:
        register_module(llm, "first", paths["jumprelu"])
    assert caught.value.status == 409


def test_an_unknown_module_cannot_be_removed(llm: LLM) -> None:
    with pytest.raises(SteeringModuleError, match="'first'") as caught:
        unregister_module(llm, "nobody")
    assert caught.value.status == 404


def test_a_module_in_use_is_neither_removed_nor_replaced(
    llm: LLM, paths: dict[str, str]
) -> None:
    register_module(llm, "hot", paths["jumprelu"])
    ids = {"prompt_token_ids": IDS}
    for name in ("r1", "r2"):
        llm.llm_engine.add_request(name, ids, steered("hot"))
    llm.llm_engine.step()
    for change in (
        lambda: unregister_module(llm, "hot"),
        lambda: replace_module(llm, "hot", paths["topk"]),
    ):
        with pytest.raises(SteeringModuleError, match="2 request") as caught:
            change()
        assert (caught.value.status, caught.value.in_use) == (409, 2)
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    unregister_module(llm, "hot")


def test_draining_refuses_new_requests_and_waits_for_the_old(
    llm: LLM, paths: dict[str, str]
) -> None:
    register_module(llm, "hot", paths["jumprelu"])
    llm.llm_engine.add_request("r", {"prompt_token_ids": IDS}, steered("hot"))
    ask = ("unregister", {"name": "hot", "drain": True})
    (reply,) = llm.collective_rpc(METHOD, args=ask)
    assert (reply.outcome, reply.in_use) == (Outcome.DRAINING, 1)
    with pytest.raises(VLLMValidationError, match="being removed or replaced"):
        llm.llm_engine.add_request("s", {"prompt_token_ids": IDS}, steered("hot"))
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    (reply,) = llm.collective_rpc(METHOD, args=ask)
    assert reply.outcome is Outcome.DONE
    assert list(list_modules(llm)) == ["first"]


def test_a_drain_can_be_given_up(llm: LLM, paths: dict[str, str]) -> None:
    register_module(llm, "hot", paths["jumprelu"])
    llm.llm_engine.add_request("r", {"prompt_token_ids": IDS}, steered("hot"))
    for action, extra in (("unregister", {"drain": True}), ("release", {})):
        llm.collective_rpc(METHOD, args=(action, {"name": "hot", **extra}))
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    check(llm, "hot", KINDS["jumprelu"])


def test_one_of_two_who_drain_leaves_and_the_module_stays_closed(
    llm: LLM, paths: dict[str, str]
) -> None:
    register_module(llm, "hot", paths["jumprelu"])
    llm.llm_engine.add_request("r", {"prompt_token_ids": IDS}, steered("hot"))

    def call(action: str, caller: str) -> Any:
        payload = {"name": "hot", "drain": True, "caller": caller}
        return llm.collective_rpc(METHOD, args=(action, payload))[0]

    def is_draining() -> bool:
        modules = call("list", "").listing["modules"]
        return next(one["draining"] for one in modules if one["name"] == "hot")

    for caller in ("a", "b"):
        assert call("unregister", caller).outcome is Outcome.DRAINING
    call("release", "a")
    assert is_draining()
    # A caller whose own change is refused opens nothing either.
    (reply,) = llm.collective_rpc(METHOD, args=("unregister", {"name": "hot"}))
    assert reply.outcome is Outcome.CONFLICT
    call("release", "c")
    assert is_draining()
    call("release", "b")
    assert not is_draining()
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    check(llm, "hot", KINDS["jumprelu"])


class Broken(Exception):
    """An injected failure."""


@pytest.mark.parametrize("verb", ["stage", "copy", "bind"])
@pytest.mark.parametrize("replacing", [False, True])
def test_a_failure_restores_what_was_there(
    llm: LLM,
    paths: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    verb: str,
    replacing: bool,
) -> None:
    if replacing:
        register_module(llm, "hot", paths["jumprelu"])
    before = list_modules(llm)
    buffers = [
        (b, b.clone())
        for site in runner(llm).steering.modules.sites.values()
        for slot in site.saes
        for b in slot.weights.buffers()
    ]

    fill = SAEPlace.fill

    def fail(*args: Any, **kwargs: Any) -> None:
        raise Broken("injected")

    def fill_and_fail(*args: Any) -> None:
        fill(*args)
        raise Broken("injected")

    if verb == "stage":
        monkeypatch.setattr(ModuleChanges, "_take", fail)
    elif verb == "copy":
        monkeypatch.setattr(SAEPlace, "fill", fill_and_fail)
    else:
        calls = iter([fail, ModuleChanges._bind])
        monkeypatch.setattr(ModuleChanges, "_bind", lambda *args: next(calls)(*args))
    with pytest.raises(SteeringModuleError, match="injected; nothing was changed"):
        replace_module(llm, "hot", paths["topk"])
    monkeypatch.undo()
    assert list_modules(llm) == before
    for buffer, content in buffers:
        assert torch.equal(buffer, content)
    if replacing:
        check(llm, "hot", KINDS["jumprelu"])
    replace_module(llm, "hot", paths["topk"])
    check(llm, "hot", KINDS["topk"])


def test_a_module_with_a_nan_leaves_nothing_behind(
    llm: LLM, paths: dict[str, str], tmp_path: Path
) -> None:
    bad = random_sae(96, models.HIDDEN, "jumprelu", 3)
    bad.W_dec[3, 5] = float("nan")
    with pytest.raises(SteeringModuleError, match="nothing was changed") as caught:
        register_module(llm, "bad", save_sae(tmp_path / "bad", {SITE: bad}))
    assert caught.value.status == 400
    assert list(list_modules(llm)) == ["first"]


def test_concurrent_calls_are_serialised(llm: LLM, paths: dict[str, str]) -> None:
    results: list[str] = []

    def register() -> None:
        try:
            register_module(llm, "hot", paths["jumprelu"])
            results.append("ok")
        except SteeringModuleError as error:
            results.append(str(error.status))

    threads = [threading.Thread(target=register) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == ["409"] * 5 + ["ok"]
    check(llm, "hot", KINDS["jumprelu"])


def test_skip_sets_come_and_go_without_running_out(
    llm: LLM, paths: dict[str, str]
) -> None:
    for token in range(40):
        register_module(llm, "hot", paths["jumprelu"], skip_token_ids=[token])
        unregister_module(llm, "hot")


def test_the_skip_set_of_a_hot_module_is_its_own(
    llm: LLM, paths: dict[str, str]
) -> None:
    register_module(llm, "hot", paths["jumprelu"], skip_token_ids=[IDS[5], IDS[9]])
    sae = random_sae(96, models.HIDDEN, "jumprelu", 3)
    sae.skip_token_ids = (IDS[5], IDS[9])
    check(llm, "hot", sae)
    check(llm, "first", KINDS["other"])


def test_a_full_compiled_engine_says_which_slot_it_needs(
    llm: LLM, paths: dict[str, str]
) -> None:
    if llm.llm_engine.vllm_config.model_config.enforce_eager:
        pytest.skip("an eager engine makes a slot")
    with pytest.raises(SteeringModuleError, match='"width": 200') as caught:
        register_module(llm, "wide", paths["wide"])
    assert caught.value.status == 409
