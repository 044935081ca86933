# SPDX-License-Identifier: Apache-2.0
"""The demo's prompts through `vllm serve` and the `openai` client."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from demo_engine import (
    MODEL,
    MODULE,
    PROMPTS,
    SEED,
    SPECS,
    STEERING,
    TEMPERATURE,
    TOKENS,
    Mode,
)

if TYPE_CHECKING:
    from openai import OpenAI


SERVER_START_S = 180.0


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def server(compiled: bool) -> Iterator[OpenAI]:
    """A `vllm serve` process with the module, and a client of it; stopped at exit.

    Raises:
        RuntimeError: the server ended or was not ready in time; with its log's end.
    """
    from openai import OpenAI

    port = free_port()
    command = [
        str(Path(sys.executable).with_name("vllm")), "serve", str(MODEL),
        "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port),
        "--additional-config", json.dumps(STEERING), "--dtype", "float32",
        "--max-model-len", "256", "--kv-cache-memory-bytes", str(1 << 28),
    ]  # fmt: skip
    if not compiled:
        command.append("--enforce-eager")
    env = {**os.environ, "VLLM_LOGGING_LEVEL": "INFO"}
    del env["VLLM_ENABLE_V1_MULTIPROCESSING"]  # the server runs its own processes
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        try:
            wait_until_ready(process, client)
            yield client
        except (RuntimeError, TimeoutError) as error:
            log.seek(0)
            tail = "".join(log.readlines()[-30:])
            raise RuntimeError(f"vllm serve: {error}; its log ends:\n{tail}") from error
        finally:
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_until_ready(process: subprocess.Popen[Any], client: OpenAI) -> None:
    """Return once the server lists its models; RuntimeError if it never does."""
    from openai import APIConnectionError

    deadline = time.monotonic() + SERVER_START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"exited with {process.returncode} before it was ready")
        try:
            client.with_options(max_retries=0, timeout=5).models.list()
            return
        except APIConnectionError:
            time.sleep(0.3)
    raise TimeoutError(f"not ready within {SERVER_START_S:g} s")


def extra_body(mode: Mode) -> dict[str, Any]:
    """What an OpenAI client adds to a request for `mode`."""
    body: dict[str, Any] = {"min_tokens": TOKENS}
    if mode.clamps is not None:
        body[SPECS] = [{"module_name": MODULE, "clamps": list(mode.clamps)}]
    return body


def ask_server(
    client: OpenAI, modes: list[Mode]
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Completions of all prompts, and one chat answer, per mode."""
    texts: dict[str, list[str]] = {}
    chats: dict[str, str] = {}
    for mode in modes:
        options: dict[str, Any] = {
            "model": "tiny",
            "max_tokens": TOKENS,
            "temperature": TEMPERATURE,
            "seed": SEED,
            "extra_body": extra_body(mode),
        }
        reply = client.completions.create(prompt=list(PROMPTS), **options)
        texts[mode.name] = [choice.text for choice in reply.choices]
        question = {"role": "user", "content": "Who are you?"}
        chat = client.chat.completions.create(messages=[question], **options)
        chats[mode.name] = chat.choices[0].message.content or ""
    return texts, chats
