# SPDX-License-Identifier: Apache-2.0
"""Clients of a server whose engine sleeps and wakes up over vLLM's own routes.

vLLM frees no memory of a CPU, so this is about requests and modules, and not about
weights; `tests/gpu/test_sleep_gpu.py` compares answers under weights that came back.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from soak.over_http import tracebacks
from steering_testing.engine import FULL
from steering_testing.modules_http import (
    KEY,
    MODULES,
    ask,
    complete,
    register,
    remove,
    save_modules,
    steering_server,
    tokens,
)

pytestmark = [pytest.mark.server, pytest.mark.slow]

LONG, SHORT = 400, 8
# Tokens of an answer that takes the engine many seconds.
VERY_LONG = 2500
STEERED: dict[str, Any] = {FULL: [{"module_name": "m"}]}
READING: dict[str, Any] = {"sae_readout_specs": [{"module_name": "m", "top_k": 3}]}
KINDS: list[dict[str, Any]] = [{}, STEERED, READING, {**STEERED, **READING}]
MODES = ("abort", "wait", "keep")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_modules(tmp_path_factory.mktemp("root").resolve())


@pytest.fixture(scope="module")
def url(
    model_root: Path, root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """A server with the module `m` and a free slot, whose engine may sleep."""
    log = tmp_path_factory.mktemp("server") / "log"
    spare = [{"layer": 1, "hook": "resid_post", "width": 128}]
    steering = {"modules": {"m": str(root / "one")}, "spare": spare}
    environment = {"VLLM_SERVER_DEV_MODE": "1"}
    with steering_server(
        model_root, root, log, steering, environment=environment
    ) as server:
        yield server.url
        assert tracebacks(log) == []


@pytest.fixture(scope="module")
def alone(url: str) -> list[dict[str, Any]]:
    """What each kind of request says on a server at rest."""
    return [choice(complete(url, kind, LONG)) for kind in KINDS]


def choice(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


class Asked:
    """A call in a thread of its own; `answer` waits for it."""

    def __init__(self, call: Callable[[], httpx.Response]):
        self._found: list[httpx.Response] = []
        self._thread = threading.Thread(target=lambda: self._found.append(call()))
        self._thread.start()

    @property
    def is_done(self) -> bool:
        return bool(self._found)

    def answer(self) -> httpx.Response:
        self._thread.join(timeout=120)
        return self._found[0]


def sleep(url: str, level: int, mode: str) -> None:
    query = f"level={level}&mode={mode}"
    assert httpx.post(f"{url}/sleep?{query}", timeout=120).status_code == 200
    assert httpx.get(f"{url}/is_sleeping").json() == {"is_sleeping": True}


def wake(url: str, level: int) -> None:
    tags = "" if level else "?tags=scheduling"
    answer = httpx.post(f"{url}/wake_up{tags}", timeout=60)
    assert answer.json()["status"] == "awake"


def wait_until_running(url: str, asked: list[Asked]) -> None:
    """Wait until the module `m` is used; a fast engine may be done before."""
    wait_for(url, "m", lambda m: is_used(m) or all(one.is_done for one in asked))


def wait_for(url: str, module: str, holds: Callable[[dict[str, Any]], object]) -> None:
    """Wait until a module is listed as described."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        listed = httpx.get(f"{url}{MODULES}/{module}", timeout=60).json()
        if holds(listed["module"]):
            return
        time.sleep(0.02)
    pytest.fail(f"it was never so: {listed}")


def is_used(module: dict[str, Any]) -> bool:
    return module["requests"] > 0


def wait_until_nothing_is_held(url: str) -> None:
    """Wait until no request names a module and no row of a table is in use."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        # Rows go back with the next step.
        choice(complete(url, {}, 2))
        listed = httpx.get(url + MODULES, timeout=60).json()
        held = [module["requests"] for module in listed["modules"]]
        if not any([*held, *listed["rows_in_use"].values()]):
            return
    pytest.fail(f"something is left: {listed}")


def assert_same(found: dict[str, Any], whole: dict[str, Any], cut: bool) -> None:
    """An answer is the whole answer, or what it begins with."""
    count = len(found["token_ids"])
    assert cut or count == len(whole["token_ids"])
    assert found["token_ids"] == whole["token_ids"][:count]
    assert found.keys() == whole.keys()
    for module, sites in (found.get("sae_features") or {}).items():
        for site, read in sites.items():
            expected = whole["sae_features"][module][site]
            for key in ("positions", "features"):
                assert read[key] == expected[key][: len(read[key])]
            # The order of a sum depends on the batch.
            for row, other in zip(read["values"], expected["values"], strict=not cut):
                assert row == pytest.approx(other, abs=1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("level", [0, 1, 2])
def test_requests_on_both_sides_of_a_sleep_say_what_they_say_alone(
    url: str, alone: list[dict[str, Any]], level: int, mode: str
) -> None:
    before = [Asked(lambda k=kind: complete(url, k, LONG)) for kind in KINDS]
    wait_until_running(url, before)
    sleep(url, level, mode)
    late = [Asked(lambda k=kind: complete(url, k, SHORT)) for kind in KINDS]
    time.sleep(0.3)
    assert not any(asked.is_done for asked in late)
    wake(url, level)
    for asked, whole in zip(late, alone, strict=True):
        assert_same(choice(asked.answer()), whole, cut=True)
    for asked, whole in zip(before, alone, strict=True):
        found = choice(asked.answer())
        assert found["finish_reason"] in ("length", mode)
        assert_same(found, whole, cut=mode == "abort")
    wait_until_nothing_is_held(url)


@pytest.mark.parametrize("level", [1, 2])
def test_modules_wait_for_the_engine_to_wake_up_and_presets_do_not(
    url: str, root: Path, alone: list[dict[str, Any]], level: int
) -> None:
    assert register(url, root).status_code == 201
    listed = httpx.get(url + MODULES, headers=KEY).json()
    sleep(url, level, "abort")
    refused = [
        register(url, root, name="other"),
        register(url, root, path=str(root / "two"), replace=True),
        register(url, root, path=str(root / "two"), replace=True, drain=True),
        remove(url),
        remove(url, "?drain=true"),
    ]
    for answer in refused:
        assert answer.status_code == 409, answer.text
        assert "wake it up first" in answer.json()["error"]["message"]
    preset = f"{url}/v1/steering/presets/calm"
    assert httpx.put(preset, json=STEERED, headers=KEY).status_code == 200
    assert httpx.get(url + MODULES, headers=KEY).json() == listed
    assert httpx.get(f"{url}/metrics").status_code == 200
    asked = Asked(lambda: complete(url, {"steering_preset": "calm"}, SHORT))
    hot = Asked(lambda: ask(url, "hot", SHORT))
    wake(url, level)
    assert_same(choice(asked.answer()), alone[1], cut=True)
    # The module `hot` has the weights of `m`.
    assert tokens(hot.answer()) == alone[1]["token_ids"][:SHORT]
    assert httpx.delete(preset, headers=KEY).status_code == 200
    assert remove(url).status_code == 200


def test_a_drain_goes_on_after_a_sleep(
    url: str, root: Path, alone: list[dict[str, Any]]
) -> None:
    """The requests that a drain waits for sleep; when they end, the module goes."""
    assert register(url, root).status_code == 201
    running = Asked(lambda: ask(url, "hot", VERY_LONG))
    wait_for(url, "hot", is_used)
    sleep(url, 0, "keep")
    draining = Asked(lambda: remove(url, "?drain=true"))
    time.sleep(0.5)
    assert not draining.is_done
    assert ask(url, "hot").status_code == 409
    wake(url, 0)
    assert tokens(running.answer())[:LONG] == alone[1]["token_ids"]
    assert draining.answer().status_code == 200
    assert ask(url, "hot").status_code == 400


def test_a_drain_ends_when_the_engine_falls_asleep(url: str, root: Path) -> None:
    """The module takes requests again, and says after the sleep what it said."""
    assert register(url, root).status_code == 201
    running = Asked(lambda: ask(url, "hot", VERY_LONG))
    wait_for(url, "hot", is_used)
    draining = Asked(lambda: remove(url, "?drain=true"))
    wait_for(url, "hot", lambda module: module["draining"])
    sleep(url, 1, "keep")
    answer = draining.answer()
    assert answer.status_code == 409, answer.text
    assert "wake it up first" in answer.json()["error"]["message"]
    wake(url, 1)
    whole = tokens(running.answer())
    assert len(whole) == VERY_LONG
    assert tokens(ask(url, "hot", SHORT)) == whole[:SHORT]
    assert remove(url).status_code == 200


def test_who_leaves_while_the_engine_sleeps_leaves_nothing_behind(url: str) -> None:
    before = [Asked(lambda: ask(url, "m", LONG)) for _ in range(3)]
    wait_until_running(url, before)
    sleep(url, 1, "keep")
    for _ in range(5):
        with pytest.raises(httpx.TimeoutException):
            body = {"model": "tiny", "prompt": [5], "max_tokens": LONG, **STEERED}
            httpx.post(f"{url}/v1/completions", json=body, timeout=0.3)
    wake(url, 1)
    assert len({tuple(tokens(asked.answer())) for asked in before}) == 1
    wait_until_nothing_is_held(url)
