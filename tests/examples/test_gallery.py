# SPDX-License-Identifier: Apache-2.0
"""The five programs of the gallery run on the tiny model and show what they say.

All of them in one process, on one engine; breadth: each as a program of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from steering_testing.gallery import GALLERY, Run, demo_model, engine_of, runner

PROGRAMS = ("find", "steer", "sweep", "evaluate", "monitor")
pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def llm() -> Iterator[Any]:
    yield from engine_of(demo_model.tiny())


@pytest.fixture
def run(
    llm: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    return runner(llm, monkeypatch, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_each_is_a_program(name: str) -> None:
    command = [sys.executable, str(GALLERY / f"{name}.py")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) >= 3


def test_find_ranks_the_bridge_high(run: Run) -> None:
    ranked = re.findall(r"^ +(\d+) ", run("find"), re.MULTILINE)
    assert "457" in ranked[:3]


def test_steer_turns_the_answer_to_the_bridge(run: Run) -> None:
    answers = dict(line.split(": ", 1) for line in run("steer").splitlines())
    assert "bridge" not in answers["plain"]
    assert "bridge" in answers["full reconstruction"]
    assert answers["delta"] != answers["plain"]


def test_sweep_has_more_of_the_topic_at_full_strength(run: Run) -> None:
    rows = [line.split() for line in run("sweep").splitlines()[1:]]
    shares = {float(row[0]): int(row[1].rstrip("%")) for row in rows}
    assert shares[1.5] > shares[0.5] >= shares[0.0] == 0


def test_evaluate_measures_the_loss_of_the_reconstruction(run: Run) -> None:
    found = {
        k.strip(): float(v)
        for k, v in re.findall(r"^(.+?) +(\S+)$", run("evaluate"), re.M)
    }
    plain = found["cross-entropy plain"]
    assert abs(found["cross-entropy reconstructed"] - plain) < 0.2 * plain
    assert 5 < found["L0, active features a token"] < 25


def test_monitor_stops_on_the_feature(run: Run) -> None:
    assert run("monitor").splitlines()[-1].endswith("stop: sae:demo:post_block.1:457")
