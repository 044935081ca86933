# SPDX-License-Identifier: Apache-2.0
"""A real API server process, for tests that speak HTTP to it."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

MODEL_NAME = "tiny"
# About 25 on an idle machine with two cores; a busy or a slow one takes its time.
READY_S = 480.0
STOP_S = 60.0
# What engines in the tests' process leave in the environment. A server must run as it
# does for users.
OWN_PROCESS_ONLY = ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_DIST_IDENT")
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # Servers that bind their threads would all bind them to the same core.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    # The log is what a failing test shows.
    "VLLM_LOGGING_LEVEL": "INFO",
}


@dataclass(frozen=True)
class Server:
    """A running server; `url` has no trailing slash."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path


def free_port() -> int:
    """A TCP port that nobody listens on now.

    The server binds it seconds later. So it is none that the kernel gives to whoever
    asks for any (those start at 32768), and none that another process of the same test
    run picks.
    """
    count = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")
    mine = range(20000 + int(worker) % count, 32768, count)
    while True:
        port = secrets.choice(mine)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@contextmanager
def api_server(
    model: Path, log: Path, *arguments: str, environment: dict[str, str] | None = None
) -> Iterator[Server]:
    """Run the OpenAI-compatible server on `model` until the block ends.

    Args:
        model: directory of a tiny model; it is served as `MODEL_NAME`.
        log: file for what the server prints.
        arguments: further options of the command line.
        environment: further environment variables.

    Raises:
        RuntimeError: not ready within `READY_S`, or processes are left after
            `STOP_S`; with the end of the log.
    """
    words = [
        str(model), "--served-model-name", MODEL_NAME,
        "--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "32",
        "--enforce-eager", *arguments,
    ]  # fmt: skip
    env = {k: v for k, v in os.environ.items() if k not in OWN_PROCESS_ONLY}
    with serving(words, log, env | ENVIRONMENT | (environment or {})) as server:
        yield server


@contextmanager
def serving(
    words: list[str], log: Path, env: dict[str, str], cwd: Path | None = None
) -> Iterator[Server]:
    """Run `vllm serve` with these words, on a port of its own, until the block ends.

    Raises:
        RuntimeError: as `api_server`.
    """
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", *words]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=env,
            stdout=sink,
            stderr=sink,
            start_new_session=True,
        )
    server = Server(f"http://127.0.0.1:{port}", process, log)
    try:
        _wait_until_ready(server)
        yield server
        _stop(server)
    finally:
        # The engine's processes are in the server's session and go with it.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_until_ready(server: Server) -> None:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        if (status := server.process.poll()) is not None:
            raise _failure(server, f"ended with status {status} before it was ready")
        with suppress(httpx.TransportError):
            if httpx.get(f"{server.url}/health", timeout=5).status_code == 200:
                return
        time.sleep(0.3)
    raise _failure(server, f"was not ready within {READY_S:g} s")


def _stop(server: Server) -> None:
    """End the server as an operator does, and see that all of it is gone."""
    server.process.terminate()
    deadline = time.monotonic() + STOP_S
    while time.monotonic() < deadline:
        # Reaps the server; its group outlives it while a child does.
        if server.process.poll() is not None and not _group_exists(server.process.pid):
            return
        time.sleep(0.1)
    raise _failure(server, f"left processes {STOP_S:g} s after SIGTERM")


def _group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _failure(server: Server, what: str) -> RuntimeError:
    lines = server.log.read_text(errors="replace").splitlines()
    tail = "\n".join(lines[-30:])
    return RuntimeError(f"the API server {what}; its log ends:\n{tail}")
