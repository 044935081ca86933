# SPDX-License-Identifier: Apache-2.0
"""The five programs of the gallery run on the real demo model, on one engine.

Skipped where neither a cache nor pip has the model's wheel.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from steering_testing.gallery import Run, demo_model, engine_of, runner

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def demo() -> Any:
    try:
        return demo_model.smollm2()
    except RuntimeError as error:  # checkpoint.Unavailable
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def llm(demo: Any) -> Iterator[Any]:
    yield from engine_of(demo)


@pytest.fixture
def run(
    llm: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    return runner(llm, monkeypatch, capsys)


@pytest.fixture(autouse=True)
def on_the_real_model(monkeypatch: pytest.MonkeyPatch, demo: Any) -> None:
    """What the programs take from their command line."""
    monkeypatch.setattr(demo_model, "tiny", lambda: demo)


def test_find_ranks_the_sea_high(run: Run, demo: Any) -> None:
    ranked = re.findall(r"^ +(\d+) ", run("find"), re.MULTILINE)
    assert str(demo.feature) in ranked[:3]


def test_steer_turns_the_answer_to_the_sea(run: Run, demo: Any) -> None:
    answers = dict(re.findall(r"^([a-z ]+): (.*)$", run("steer"), re.MULTILINE))
    share = {name: demo_model.topic_share(text, demo) for name, text in answers.items()}
    assert share["full reconstruction"] > share["plain"]
    assert answers["delta"] != answers["plain"]


def test_sweep_has_more_of_the_topic_at_full_strength(run: Run) -> None:
    rows = [line.split() for line in run("sweep").splitlines()[1:]]
    shares = {float(row[0]): int(row[1].rstrip("%")) for row in rows}
    # The texts are sampled, and differ from one kind of CPU to another.
    assert max(shares[at] for at in shares if at >= 1.0) > shares[0.0]


def test_evaluate_measures_the_loss_of_the_reconstruction(run: Run) -> None:
    text = run("evaluate")
    found = {k.strip(): float(v) for k, v in re.findall(r"^(.+?) +(\S+)$", text, re.M)}
    plain = found["cross-entropy plain"]
    assert abs(found["cross-entropy reconstructed"] - plain) < 0.2 * plain
    assert 30 < found["L0, active features a token"] < 150


def test_monitor_stops_on_the_feature(run: Run, demo: Any) -> None:
    last = run("monitor").splitlines()[-1]
    assert last.endswith(f"stop: sae:demo:post_block.15:{demo.feature}")
