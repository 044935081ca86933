# SPDX-License-Identifier: Apache-2.0
"""One engine behind two API server processes, as an operator runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from steering_testing import models
from steering_testing.engine import FULL, save_sae
from steering_testing.reference import random_sae
from steering_testing.server import ENVIRONMENT, MODEL_NAME, OWN_PROCESS_ONLY, free_port

pytestmark = pytest.mark.server

KEY = {"Authorization": "Bearer the-key"}
READY_S = 240.0
MODULES = "/v1/steering/modules"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("root").resolve()
    for seed, name in enumerate(("one", "two")):
        sae = random_sae(96, models.HIDDEN, "jumprelu", seed)
        save_sae(root / name, {(1, "post_block"): sae})
    return root


@pytest.fixture(scope="module")
def url(
    model_root: Path, root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """Address of a server with two API server processes, spare slots and a key."""
    spare = [{"layer": 1, "hook": "resid_post", "width": 128}]
    steering = {"spare": spare, "module_roots": [str(root)]}
    port = free_port()
    command = [
        sys.executable, "-m", "vllm.entrypoints.cli.main", "serve",
        str(models.save("llama", model_root)), "--served-model-name", MODEL_NAME,
        "--host", "127.0.0.1", "--port", str(port), "--api-server-count", "2",
        "--dtype", "float32", "--max-num-seqs", "16",
        "--max-model-len", "4096",
        "--hf-overrides", json.dumps({"max_position_embeddings": 4096}),
        "--enforce-eager", "--skip-tokenizer-init",
        "--steering-api-key", "the-key",
        "--additional-config", json.dumps({"steering": steering}),
    ]  # fmt: skip
    env = {k: v for k, v in os.environ.items() if k not in OWN_PROCESS_ONLY}
    env |= ENVIRONMENT | {"VLLM_PLUGINS": "steering"}
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command, env=env, stdout=sink, stderr=sink, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + READY_S
        while not is_ready(url):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail("not ready:\n" + log.read_text(errors="replace")[-3000:])
            time.sleep(0.5)
        yield url
        assert "the-key" not in log.read_text(errors="replace")
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def is_ready(url: str) -> bool:
    with suppress(httpx.TransportError):
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    return False


def ask(url: str, module: str, max_tokens: int = 4) -> httpx.Response:
    """A steered completion over a connection of its own: either process may get it."""
    body: dict[str, Any] = {
        "model": MODEL_NAME,
        "prompt": [5, 6, 7, 8],
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "detokenize": False,
        FULL: [{"module_name": module}],
    }
    return httpx.post(f"{url}/v1/completions", json=body, timeout=120)


def tokens(response: httpx.Response) -> list[int]:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["token_ids"]


def register(url: str, root: Path, **more: Any) -> httpx.Response:
    body = {"name": "hot", "path": str(root / "one"), **more}
    return httpx.post(url + MODULES, json=body, headers=KEY, timeout=120)


def remove(url: str, query: str = "") -> httpx.Response:
    return httpx.delete(f"{url}{MODULES}/hot{query}", headers=KEY, timeout=120)


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
    # 400: refused in the front end; 409: the engine says that the module changes.
    assert {response.status_code for response in found} <= {200, 400, 409}
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
    assert 'vllm:steering_tokens{phase="decode",tier="full"}' in shown
    assert 'vllm:steering_refused_requests_total{reason="module"}' in shown
    assert "vllm:num_requests_running" in shown
