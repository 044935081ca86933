# SPDX-License-Identifier: Apache-2.0
"""The five programs of the gallery run on the tiny model and show what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.engine


def run(name: str) -> str:
    """Standard output of a program."""
    command = [sys.executable, str(ROOT / "examples" / "gallery" / f"{name}.py")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_find_ranks_the_bridge_high() -> None:
    ranked = re.findall(r"^ +(\d+) ", run("find"), re.MULTILINE)
    assert "457" in ranked[:3]


@pytest.mark.slow
def test_steer_turns_the_answer_to_the_bridge() -> None:
    answers = dict(line.split(": ", 1) for line in run("steer").splitlines())
    assert "bridge" not in answers["plain"]
    assert "bridge" in answers["full reconstruction"]
    assert answers["delta"] != answers["plain"]


@pytest.mark.slow
def test_sweep_has_more_of_the_topic_at_full_strength() -> None:
    rows = [line.split() for line in run("sweep").splitlines()[1:]]
    shares = {float(row[0]): int(row[1].rstrip("%")) for row in rows}
    assert shares[1.5] > shares[0.5] >= shares[0.0] == 0


@pytest.mark.slow
def test_evaluate_measures_the_loss_of_the_reconstruction() -> None:
    found = {
        k.strip(): float(v)
        for k, v in re.findall(r"^(.+?) +(\S+)$", run("evaluate"), re.M)
    }
    plain = found["cross-entropy plain"]
    assert abs(found["cross-entropy reconstructed"] - plain) < 0.2 * plain
    assert 5 < found["L0, active features a token"] < 25


@pytest.mark.slow
def test_monitor_stops_on_the_feature() -> None:
    assert run("monitor").splitlines()[-1].endswith("stop: sae:demo:post_block.1:457")
