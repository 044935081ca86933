# SPDX-License-Identifier: Apache-2.0
"""The engine goes on while the files of a module are read."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from steering_testing import hot_modules
from steering_testing.engine import engine
from steering_testing.hot_modules import IDS, KINDS, check, steered

from vllm import LLM
from vllm.config.steering_replies import METHOD, ModuleReply, Outcome
from vllm.entrypoints.steering import (
    list_modules,
    register_module,
    unregister_module,
)
from vllm.model_executor.model_loader.sae_inspector import (
    ModuleInspector,
    module_inspector,
)
from vllm.v1.engine import steering_loading

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def llm(model_root: Path, paths: dict[str, str]) -> Iterator[LLM]:
    modules = {"first": paths["other"]}
    spare = {"spare": hot_modules.SPARE}
    with engine(hot_modules.FAMILY, model_root, modules, spare) as llm:
        yield llm


@pytest.fixture(autouse=True)
def only_the_first_module_is_left(llm: LLM) -> Iterator[None]:
    yield
    hot_modules.leave_only_the_first(llm)


class Gate:
    """Holds every load until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.opened = threading.Event()
        load = ModuleInspector.load

        def held(*args: Any) -> float:
            assert self.opened.wait(60)
            return load(*args)

        monkeypatch.setattr(ModuleInspector, "load", held)


def ask(llm: LLM, action: str, payload: dict[str, Any]) -> ModuleReply:
    """One call of the registry; it must not wait for files."""
    start = time.monotonic()
    (reply,) = llm.collective_rpc(METHOD, args=(action, payload))
    assert time.monotonic() - start < 2.0
    return reply


def inspected(llm: LLM, name: str, path: str, **options: Any) -> dict[str, Any]:
    """The payload that registers a module."""
    call = ("inspect", {"name": name, "path": path})
    (reply,) = llm.collective_rpc(METHOD, args=call)
    return {"module": reply.module, **options}


def wait(llm: LLM, payload: dict[str, Any]) -> ModuleReply:
    deadline = time.monotonic() + 60
    while (reply := ask(llm, "register", payload)).outcome is Outcome.LOADING:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return reply


def test_tokens_flow_while_a_module_loads(
    llm: LLM, paths: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    register_module(llm, "hot", paths["relu"])
    payload = inspected(llm, "hot", paths["topk"], replace=True)
    gate = Gate(monkeypatch)
    assert ask(llm, "register", payload).outcome is Outcome.LOADING
    # The module that is to be replaced serves on, and others too.
    check(llm, "hot", KINDS["relu"])
    check(llm, "first", KINDS["other"])
    assert ask(llm, "register", payload).outcome is Outcome.LOADING
    gate.opened.set()
    assert wait(llm, payload).outcome is Outcome.DONE
    check(llm, "hot", KINDS["topk"])


def test_a_module_that_came_into_use_meanwhile_is_not_replaced(
    llm: LLM, paths: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    register_module(llm, "hot", paths["relu"])
    payload = inspected(llm, "hot", paths["topk"], replace=True)
    gate = Gate(monkeypatch)
    assert ask(llm, "register", payload).outcome is Outcome.LOADING
    llm.llm_engine.add_request("r", {"prompt_token_ids": IDS}, steered("hot"))
    gate.opened.set()
    reply = wait(llm, payload)
    assert (reply.outcome, reply.in_use) == (Outcome.CONFLICT, 1)
    # One that waits drains only now, and keeps what it has loaded.
    draining = {**payload, "drain": True}
    assert wait(llm, draining).outcome is Outcome.DRAINING
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    assert ask(llm, "register", draining).outcome is Outcome.DONE
    check(llm, "hot", KINDS["topk"])


def test_a_load_has_a_limit_on_time_and_the_engine_keeps_what_it_had(
    llm: LLM, paths: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    register_module(llm, "hot", paths["relu"])
    limits = type(module_inspector().limits)
    monkeypatch.setattr(limits, "seconds_for", lambda self, size: 0.0)
    payload = inspected(llm, "hot", paths["topk"], replace=True)
    reply = wait(llm, payload)
    assert reply.outcome is Outcome.INVALID
    assert "took more than the 0 s allowed; nothing was changed" in reply.error
    monkeypatch.undo()
    check(llm, "hot", KINDS["relu"])


def test_callers_take_turns_and_one_that_goes_away_ends_its_turn(
    llm: LLM, paths: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = inspected(llm, "one", paths["relu"])
    two = inspected(llm, "two", paths["topk"])
    gate = Gate(monkeypatch)
    assert ask(llm, "register", one).outcome is Outcome.LOADING
    gate.opened.set()
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline:
        assert ask(llm, "register", two).outcome is Outcome.LOADING
        time.sleep(0.1)
    assert wait(llm, one).outcome is Outcome.DONE
    assert wait(llm, two).outcome is Outcome.DONE
    check(llm, "one", KINDS["relu"])
    check(llm, "two", KINDS["topk"])
    for name in ("one", "two"):
        unregister_module(llm, name)
    ask(llm, "register", one)
    ask(llm, "release", {"name": "one"})
    assert wait(llm, two).outcome is Outcome.DONE
    unregister_module(llm, "two")
    ask(llm, "register", one)
    monkeypatch.setattr(steering_loading, "ABANDONED_S", 0.0)
    assert wait(llm, two).outcome is Outcome.DONE
    assert list(list_modules(llm)) == ["first", "two"]


def test_a_module_whose_files_changed_since_is_refused(
    llm: LLM, paths: dict[str, str], tmp_path: Path
) -> None:
    files = hot_modules.save_modules(tmp_path)
    payload = inspected(llm, "hot", files["relu"])
    (Path(files["relu"]) / "manifest.json").write_text("{}")
    reply = wait(llm, payload)
    assert reply.outcome is Outcome.INVALID
    assert "nothing was changed" in reply.error
    assert list(list_modules(llm)) == ["first"]
    check(llm, "first", KINDS["other"])
