# SPDX-License-Identifier: Apache-2.0
"""An engine that dies, or a server that is stopped: who waits is told, and all ends."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from soak.over_http import tracebacks
from steering_testing.golden_gate import EXAMPLE, FULL, MODULE, example_server
from steering_testing.processes import Process, descendants
from steering_testing.server import MODEL_NAME, Server

pytestmark = pytest.mark.server

KEY = {"Authorization": "Bearer the-key"}
URL = "/v1/steering"
TEXTS = {"module_name": MODULE, "input": ["the chef " * 50] * 8}
TOLD_S = 20.0
GONE_S = 60.0


def calls(path: str) -> list[tuple[str, str, Any]]:
    """Each route that asks the engine, and vLLM's own completions."""
    one = f"{URL}/modules/{MODULE}"
    preset = {FULL: [{"module_name": MODULE}]}
    completion = {"model": MODEL_NAME, "prompt": "the chef", "max_tokens": 2}
    return [
        ("GET", f"{URL}/modules", None),
        ("GET", one, None),
        ("GET", f"{one}/features?q=bridge", None),
        ("GET", f"{one}/evidence?index=1", None),
        ("GET", f"{URL}/presets", None),
        ("POST", f"{URL}/encode", TEXTS),
        ("POST", f"{URL}/modules", {"name": "hot", "path": path}),
        ("DELETE", f"{one}?drain=true", None),
        ("PUT", f"{URL}/presets/mine", preset),
        ("PUT", f"{URL}/default_preset", {"preset": None}),
        ("POST", "/v1/completions", completion),
    ]


def process_of(server: Server, name: str) -> Process:
    return next(one for one in descendants(server.process.pid) if name in one.name)


def client_of(server: Server) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(
        base_url=server.url, headers=KEY, timeout=TOLD_S + 5, limits=limits
    )


def ask_and_kill(
    server: Server, name: str, path: str
) -> list[httpx.Response | BaseException]:
    """The answers, or errors, of calls that wait for a process when it is killed."""
    engine = process_of(server, name)

    async def run() -> list[httpx.Response | BaseException]:
        async with client_of(server) as client:
            # It answers nobody from now on.
            os.kill(engine.pid, signal.SIGSTOP)
            asked = [
                asyncio.create_task(client.request(method, url, json=body))
                for method, url, body in calls(path)
            ]
            await asyncio.sleep(2)
            if name == "EngineCore":
                early = [one.result().text for one in asked if one.done()]
                assert not early
            os.kill(engine.pid, signal.SIGKILL)
            told = asyncio.gather(*asked, return_exceptions=True)
            return await asyncio.wait_for(told, TOLD_S)

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("EngineCore", ()),
        pytest.param("Worker", (), marks=pytest.mark.slow),
        pytest.param("EngineCore", ("--api-server-count", "2"), marks=pytest.mark.slow),
    ],
)
def test_clients_that_wait_get_a_server_error_and_the_server_ends(
    tmp_path: Path, name: str, options: tuple[str, ...]
) -> None:
    sae = str(EXAMPLE / "sae")
    steering = {"module_roots": [str(EXAMPLE.resolve())]}
    modules = ("--steering-modules", f"{MODULE}={sae}")
    with example_server(
        tmp_path / "log",
        *("--steering-api-key", "the-key", *modules, *options),
        steering=steering,
    ) as server:
        answers = ask_and_kill(server, name, sae)
        refused = 0
        for answer in answers:
            # With several API servers, vLLM ends them all. Those that learn of that
            # before they hear from the engine say that they end.
            if options and isinstance(answer, httpx.RemoteProtocolError):
                refused += 1
                continue
            assert isinstance(answer, httpx.Response), answer
            # The engine core answers some calls without its worker.
            expected = (500,) if name == "EngineCore" else (200, 500)
            expected += (503,) if options else ()
            assert answer.status_code in expected, answer.text
            if answer.status_code >= 500:
                refused += 1
                assert answer.json()["error"]["message"]
        assert refused > 5
        server.process.wait(GONE_S)
        # What the engine started is gone too, or the block cannot end.


def ask_and_stop(server: Server, path: str) -> list[httpx.Response]:
    """The answers of calls that wait when the server is told to end.

    A drain asks the engine again and again; the others have asked it once.
    """
    long = {"prompt": "the chef", "max_tokens": 200, "ignore_eos": True, "n": 16}
    busy = {"model": MODEL_NAME, **long, FULL: [{"module_name": MODULE}]}

    async def run() -> list[httpx.Response]:
        async with client_of(server) as client:
            # vLLM's own calls may wait on; these clients leave.
            users = asyncio.create_task(client.post("/v1/completions", json=busy))
            modules = f"{URL}/modules"
            while not (await client.get(modules)).json()["modules"][0]["requests"]:
                await asyncio.sleep(0.02)
            drain = client.delete(f"{modules}/{MODULE}?drain=true")
            asked = [asyncio.create_task(drain)]
            while not (await client.get(modules)).json()["modules"][0]["draining"]:
                await asyncio.sleep(0.02)
            os.kill(process_of(server, "EngineCore").pid, signal.SIGSTOP)
            asked += [
                asyncio.create_task(client.request(method, url, json=body))
                for method, url, body in calls(path)
                if url.startswith(URL)
            ]
            await asyncio.sleep(2)
            assert not any(one.done() for one in asked)
            server.process.terminate()
            told = await asyncio.wait_for(asyncio.gather(*asked), TOLD_S)
            users.cancel()
            return told

    return asyncio.run(run())


def test_clients_that_wait_are_told_that_the_server_shuts_down(tmp_path: Path) -> None:
    sae = str(EXAMPLE / "sae")
    options = ("--steering-api-key", "the-key", "--steering-modules", f"{MODULE}={sae}")
    steering = {"module_roots": [str(EXAMPLE.resolve())]}
    with example_server(tmp_path / "log", *options, steering=steering) as server:
        for answer in ask_and_stop(server, sae):
            assert answer.status_code == 503, answer.text
            message = answer.json()["error"]["message"]
            assert message == "the server is shutting down; nothing was changed"
        assert server.process.wait(GONE_S) == 0
        # vLLM may log that its own task, which hands out tokens, has lost the engine.
        found = tracebacks(server.log)
        assert [one for one in found if "output_handler" not in one] == []


def ask_and_end(server: Server) -> list[httpx.Response]:
    """Answers of a steered and read request, alone and while the server ends; then
    that of a drain which waits for the second."""
    body = {
        "model": MODEL_NAME,
        "prompt": ["the chef"] * 16,
        "max_tokens": 200,
        "temperature": 0,
        "ignore_eos": True,
        FULL: [{"module_name": MODULE}],
        "sae_readout_specs": [{"module_name": MODULE, "top_k": 2, "phase": "decode"}],
    }

    async def run() -> list[httpx.Response]:
        async with client_of(server) as client:
            before = await client.post("/v1/completions", json=body)
            assert before.status_code == 200, before.text
            during = asyncio.create_task(client.post("/v1/completions", json=body))

            async def until(key: str) -> None:
                while not (await client.get(modules)).json()["modules"][0][key]:
                    assert not during.done(), "it has ended too early"
                    await asyncio.sleep(0.01)

            modules = f"{URL}/modules"
            await until("requests")
            drain = asyncio.create_task(client.delete(f"{modules}/{MODULE}?drain=true"))
            await until("draining")
            server.process.terminate()
            return [before, await during, await drain]

    return asyncio.run(run())


@pytest.mark.slow
def test_a_server_that_waits_for_its_requests_gives_whole_answers(
    tmp_path: Path,
) -> None:
    """With `--shutdown-timeout`, requests under way end as they do without a stop."""
    sae = str(EXAMPLE / "sae")
    options = ("--steering-api-key", "the-key", "--steering-modules", f"{MODULE}={sae}")
    wait = ("--shutdown-timeout", "60")
    with example_server(tmp_path / "log", *options, *wait, steering={}) as server:
        before, during, drain = ask_and_end(server)
        assert during.status_code == 200, during.text
        alone, ended = before.json()["choices"], during.json()["choices"]
        assert [one["text"] for one in ended] == [one["text"] for one in alone]
        for one, other in zip(ended, alone, strict=True):
            read, expected = (
                choice["sae_features"][MODULE]["post_block.1"]
                for choice in (one, other)
            )
            assert read["positions"] == expected["positions"]
            # Batches of other sizes round differently.
            np.testing.assert_allclose(
                read["values"], expected["values"], rtol=1e-3, atol=1e-3
            )
        assert drain.status_code == 503, drain.text
        assert "shutting down" in drain.json()["error"]["message"]
        assert server.process.wait(GONE_S) == 0
        found = tracebacks(server.log)
        assert [one for one in found if "output_handler" not in one] == []
