# SPDX-License-Identifier: Apache-2.0
"""The README's offline and server examples run exactly as they are written."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cost_table
import httpx
import pytest
from steering_testing.gallery import demo_model
from steering_testing.server import ENVIRONMENT, OWN_PROCESS_ONLY, free_port

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
READY_S = 480.0


@pytest.mark.parametrize(
    ("begin", "end", "text"),
    [
        (cost_table.BEGIN, cost_table.END, cost_table.table),
        (cost_table.SPEED_BEGIN, cost_table.SPEED_END, cost_table.speed),
    ],
    ids=["table", "sentence"],
)
def test_the_costs_are_those_of_the_result_files(
    begin: str, end: str, text: Callable[[], str]
) -> None:
    shown = README.split(begin)[1].split(end)[0].strip()
    assert shown == text(), "run `python tools/cost_table.py --write`"


def block(section: str, language: str) -> str:
    """The first code block of a language under a heading."""
    text = README.split(f"\n## {section}\n", 1)[1].split("\n## ", 1)[0]
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)[0]


def environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in OWN_PROCESS_ONLY}
    return kept | ENVIRONMENT | {"VLLM_PLUGINS": "steering"}


def python(code: str) -> str:
    command = [sys.executable, "-c", code]
    env = {**environment(), "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_every_image_and_page_that_it_names_is_there() -> None:
    links = re.findall(r"\]\(([^)#]+)", README)
    assert links
    for link in links:
        assert link.startswith("http") or (ROOT / link).exists(), link


@pytest.mark.slow
@pytest.mark.server
def test_the_server_example_speaks_of_the_bridge(tmp_path: Path) -> None:
    port = free_port()
    words = shlex.split(block("Server", "bash").replace("\\\n", " "))
    assert words[:2] == ["vllm", "serve"]
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", *words[1:]]
    command += ["--port", str(port), "--enforce-eager"]
    url = f"http://localhost:{port}"
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=log, stderr=log
        )
    try:
        deadline = time.monotonic() + READY_S
        while not _is_ready(url):
            assert server.poll() is None, (tmp_path / "log").read_text()[-2000:]
            assert time.monotonic() < deadline
            time.sleep(1)
        code = block("Server", "python")
        said = python(code.replace("http://localhost:8000", url))
        assert said.strip() == block("Server", "text").strip()
    finally:
        server.terminate()
        server.wait(60)


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.slow
@pytest.mark.engine
def test_the_offline_example_speaks_of_the_bridge(tmp_path: Path) -> None:
    # vLLM's engine process imports the program: it must be a file.
    program = tmp_path / "offline.py"
    program.write_text(block("Offline", "python"))
    done = subprocess.run(
        [sys.executable, str(program)],
        cwd=ROOT,
        env={**environment(), "VLLM_LOGGING_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-2:] == block("Offline", "text").splitlines()


@pytest.mark.slow
@pytest.mark.engine
def test_the_first_example_answers_as_it_shows() -> None:
    try:
        model = demo_model.smollm2().model
    except RuntimeError as error:  # checkpoint.Unavailable
        pytest.skip(str(error))
    code, shown = re.findall(r"```(?:python|text)\n(.*?)```", README, re.DOTALL)[:2]
    start = (
        "import os\nos.environ['VLLM_ENABLE_V1_MULTIPROCESSING'] = '0'\n"
        "from vllm import LLM\n"
        "from vllm.config.sae_steering_types import *\n"
        f"SMOLLM2 = {str(model)!r}\n"
    )
    answers = python(start + code).strip().splitlines()
    for line, answer in zip(shown.splitlines(), answers, strict=True):
        assert answer.startswith(line.removesuffix("…").strip())
