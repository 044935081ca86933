# SPDX-License-Identifier: Apache-2.0
"""One engine behind two API server processes, as an operator runs it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
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

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_modules(tmp_path_factory.mktemp("root").resolve())


@pytest.fixture(scope="module")
def url(
    model_root: Path, root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """Address of a server with two API server processes, spare slots and a key."""
    log = tmp_path_factory.mktemp("server") / "log"
    spare = [{"layer": 1, "hook": "resid_post", "width": 128}]
    with steering_server(
        model_root, root, log, {"spare": spare}, "--api-server-count", "2"
    ) as server:
        yield server.url
        assert "the-key" not in log.read_text(errors="replace")


def test_every_api_server_sees_a_module_come_change_and_go(
    url: str, root: Path
) -> None:
    assert ask(url, "hot").status_code == 400
    assert register(url, root).status_code == 201
    first = [tokens(ask(url, "hot")) for _ in range(12)]
    assert register(url, root, path=str(root / "two"), replace=True).status_code == 201
    second = [tokens(ask(url, "hot")) for _ in range(12)]
    assert all(found == first[0] for found in first)
    assert all(found == second[0] for found in second)
    assert first[0] != second[0]
    assert remove(url).status_code == 200
    assert [ask(url, "hot").status_code for _ in range(12)] == [400] * 12


def test_every_api_server_sees_a_preset_come_and_go(url: str, root: Path) -> None:
    assert register(url, root).status_code == 201
    wanted = tokens(ask(url, "hot"))
    preset = f"{url}/v1/steering/presets/calm"
    default = f"{url}/v1/steering/default_preset"
    put = httpx.put(preset, json={FULL: [{"module_name": "hot"}]}, headers=KEY)
    assert put.status_code == 200
    chosen = {"steering_preset": "calm"}
    assert all(tokens(complete(url, chosen)) == wanted for _ in range(12))
    named = httpx.put(default, json={"preset": "calm"}, headers=KEY)
    assert named.status_code == 200
    assert all(tokens(complete(url, {})) == wanted for _ in range(12))
    listed = [httpx.get(f"{url}/v1/models").json()["data"] for _ in range(12)]
    assert all("calm" in {model["id"] for model in models} for models in listed)
    none = httpx.put(default, json={"preset": None}, headers=KEY)
    assert none.status_code == 200
    assert all(tokens(complete(url, {})) != wanted for _ in range(12))
    assert httpx.delete(preset, headers=KEY).status_code == 200
    assert [complete(url, chosen).status_code for _ in range(12)] == [400] * 12
    assert remove(url).status_code == 200


LONG = 3000  # tokens of an answer that takes the engine many seconds


def wait_for(url: str, field: str) -> None:
    """Wait until the module `hot` is listed with a true `field`.

    On two cores an API server may take seconds to answer beside a busy engine.
    """
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        answer = httpx.get(url + MODULES, headers=KEY, timeout=60)
        (module,) = answer.json()["modules"]
        if module[field]:
            return
    pytest.fail(f"{field} was never seen")


def test_a_drain_waits_refuses_newcomers_and_then_removes(url: str, root: Path) -> None:
    assert register(url, root).status_code == 201
    done: list[httpx.Response] = []
    # Few and long: however slow the API servers are, the engine has something to do.
    threads = [
        threading.Thread(target=lambda: done.append(ask(url, "hot", LONG)))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    wait_for(url, "requests")
    busy = remove(url)
    assert busy.status_code == 409
    assert busy.json()["error"]["in_use"] > 0
    assert remove(url, "?drain=true").status_code == 200
    assert [ask(url, "hot").status_code for _ in range(4)] == [400] * 4
    for thread in threads:
        thread.join()
    # Those that came while it drained were refused, the others were waited for.
    served = [response for response in done if response.status_code == 200]
    assert {len(tokens(response)) for response in served} == {LONG}
    assert {response.status_code for response in done} <= {200, 400, 409}


def test_strangers_change_nothing(url: str, root: Path) -> None:
    body = {"name": "hot", "path": str(root / "one")}
    assert httpx.post(url + MODULES, json=body).status_code == 401
    assert httpx.delete(f"{url}{MODULES}/hot").status_code == 401


def test_requests_race_with_replacements_and_no_one_fails_but_them(
    url: str, root: Path
) -> None:
    assert register(url, root).status_code == 201
    found: list[httpx.Response] = []
    threads = [
        threading.Thread(target=lambda: found.append(ask(url, "hot", 2)))
        for _ in range(24)
    ]
    for thread in threads:
        thread.start()
    for turn in range(4):
        path = str(root / ("two", "one")[turn % 2])
        answer = register(url, root, path=path, replace=True, drain=True)
        assert answer.status_code == 201, answer.text
    for thread in threads:
        thread.join()
    # 409: the module is being replaced just then.
    assert {response.status_code for response in found} <= {200, 409}
    assert len(tokens(ask(url, "hot"))) == 4
    assert remove(url).status_code == 200


def test_the_metrics_are_beside_vllms_own(url: str, root: Path) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        shown = httpx.get(f"{url}/metrics").text
        if "vllm:steering_modules 0.0" in shown:
            break
        time.sleep(0.5)
    assert "vllm:steering_modules 0.0" in shown
    # One of the two servers counts the engine's tokens, both count their requests.
    total = 'vllm:steering_tokens_total{module="hot",phase="prefill",tier="full"} '
    assert float(shown.split(total)[1].split()[0]) > 0
    assert f'vllm:steering_requests_total{{field="{FULL}",module="hot"}}' in shown
    assert 'vllm:steering_refused_requests_total{reason="module"}' in shown
    assert "vllm:num_requests_running" in shown
