# SPDX-License-Identifier: Apache-2.0
"""Presets are checked beside the engine's steps, under the configuration of then."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
from steering_testing.specs import CONFIG, FULL, module

from vllm.config.steering import SteeringConfig
from vllm.config.steering_replies import ModuleReply, Outcome
from vllm.plugins.steering.v1.engine.core import in_a_list
from vllm.v1.engine.steering_preset_checks import PresetChecks

DONE = ModuleReply(outcome=Outcome.DONE)


class Engine:
    """The configuration of an engine, which changes during the first checks."""

    def __init__(self, *later: SteeringConfig):
        self.now: SteeringConfig = CONFIG
        self.later = list(later)
        self.threads: set[str] = set()

    def keep(
        self, before: SteeringConfig, after: SteeringConfig, payload: dict[str, Any]
    ) -> ModuleReply | None:
        self.threads.add(threading.current_thread().name)
        if self.later:
            self.now = self.later.pop(0)
            return None
        self.now = replace(after, version=before.version + 1)
        return DONE


def put(engine: Engine, module_name: str) -> ModuleReply:
    checks = PresetChecks(lambda: engine.now, engine.keep)
    payload = {"name": "p", "preset": {FULL: [{"module_name": module_name}]}}
    return checks.change("put_preset", payload).result(timeout=60)


def test_a_preset_is_checked_in_a_thread_of_its_own() -> None:
    engine = Engine()
    reply = put(engine, "one")
    assert reply.outcome is Outcome.DONE
    assert list(engine.now.presets) == ["p"]
    assert reply.config == engine.now.to_json()
    [name] = engine.threads
    assert name.startswith("steering-presets")


def test_it_is_checked_again_if_modules_change_meanwhile() -> None:
    without = {n: m for n, m in CONFIG.modules.items() if n != "one"}
    engine = Engine(replace(CONFIG, modules=without, version=1))
    reply = put(engine, "one")
    assert reply.outcome is Outcome.INVALID
    assert "module_name" in reply.error and engine.now.presets == {}

    added = {**CONFIG.modules, "new": module("new", 3)}
    engine = Engine(CONFIG, replace(CONFIG, modules=added, version=1))
    assert put(engine, "new").outcome is Outcome.INVALID
    engine = Engine(replace(CONFIG, modules=added, version=1))
    assert put(engine, "one").outcome is Outcome.DONE
    assert "new" in engine.now.modules


def test_a_check_that_fails_is_no_call_without_an_end() -> None:
    def fail(*_: object) -> ModuleReply:
        raise MemoryError("a defect")

    checks = PresetChecks(lambda: CONFIG, fail)
    payload = {"name": "p", "preset": {FULL: [{"module_name": "one"}]}}
    listed = in_a_list(checks.change("put_preset", payload))
    with pytest.raises(MemoryError, match="a defect"):
        listed.result(timeout=60)
    kept = PresetChecks(lambda: CONFIG, Engine().keep).change("put_preset", payload)
    assert [one.outcome for one in in_a_list(kept).result(60)] == [Outcome.DONE]


def test_the_reply_has_the_configuration_after_a_refusal_too() -> None:
    engine = Engine()
    reply = put(engine, "absent")
    assert reply.outcome is Outcome.INVALID
    assert reply.config == CONFIG.to_json()
