# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels on a CPU: the tests of this folder under Triton's interpreter.

They run in a separate process, with the Triton that `make triton` installs beside the
virtual environment, so that vLLM's CPU build does not see it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from steering_testing.pytest_process import run_pytest

HERE = Path(__file__).parent
TRITON = Path(os.environ.get("STEERING_TRITON", Path(sys.prefix) / "triton"))
LEAST = 40  # at least so many tests must have run, so that skipping all is a failure


pytestmark = [
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="this is that process"
    ),
    pytest.mark.skipif(
        not (TRITON / "triton").is_dir(), reason="run `make triton` first"
    ),
]


def search_path() -> str:
    """Where a process finds the Triton beside the virtual environment."""
    return os.pathsep.join(filter(None, [str(TRITON), os.environ.get("PYTHONPATH")]))


def interpret(folder: Path, *options: str) -> int:
    """Run the tests of the kernels interpreted; returns how many have passed.

    The interpreter uses one core, so two processes share the files.
    """
    files = [str(path) for path in sorted(HERE.glob("test_*_gpu.py"))]
    middle = len(files) // 2
    halves = {"first": files[:middle], "second": files[middle:]}
    env = {"TRITON_INTERPRET": "1", "PYTHONPATH": search_path(), "OMP_NUM_THREADS": "1"}
    printed = run_pytest(
        folder, {name: ["-q", *options, *half] for name, half in halves.items()}, env
    )
    passed = [re.search(r"(\d+) passed", text) for text in printed.values()]
    assert all(passed), printed
    return sum(int(found[1]) for found in passed if found)


# It waits for some hundred tests, each of which has a time limit of its own. They take
# four minutes of processor time, and much longer where others use the cores too.
@pytest.mark.timeout(1800)
def test_the_triton_kernels_equal_the_reference_when_interpreted(
    tmp_path: Path,
) -> None:
    assert interpret(tmp_path, "-m", "not slow") >= LEAST


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_small_case_equals_the_reference_when_interpreted(
    tmp_path: Path,
) -> None:
    assert interpret(tmp_path, "-m", "slow") >= LEAST


def compile_for(capability: int) -> None:
    run = subprocess.run(
        [sys.executable, str(HERE / "compile_triton.py"), str(capability)],
        env={**os.environ, "PYTHONPATH": search_path()},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-6000:]
    assert run.stdout.count("compiled") == 33


def test_the_triton_kernels_compile_for_hopper_without_a_gpu() -> None:
    compile_for(90)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("capability", [80, 89, 100, 120])
def test_the_triton_kernels_compile_for_other_cards(capability: int) -> None:
    """With tiles that the shared memory of A100, L40S and B200 holds."""
    compile_for(capability)
