# SPDX-License-Identifier: Apache-2.0
"""A short chaos run: no wrong token, no exception, no leak."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from soak import over_http
from soak.report import summary
from soak.soak import Plan, run

pytestmark = pytest.mark.engine


def test_any_schedule_says_what_each_request_says_alone(tmp_path: Path) -> None:
    # Bounded by requests: about 25 seconds on two idle cores.
    plan = Plan(seed=1, seconds=450, requests=300, distinct=60, steps_per_fault=4)
    reports = run(plan, tmp_path)
    text = "\n".join(line for report in reports for line in report.lines())
    print(text)
    assert not any(report.failed for report in reports), text
    squeezed, ahead, drafts = reports
    for report in reports:
        assert report.requests >= 100, text
        assert report.left_out.total() < 30, text
        for fault in ("abort", "disconnect", "preempt all", "dummy run"):
            assert report.faults[fault] > 0, f"{fault} never happened: {text}"
        for fault in ("module registered", "preset changed"):
            assert report.faults[fault] > 0, f"{fault} never happened: {text}"
    assert squeezed.schedule["preempted"] > squeezed.faults["preempt all"], text
    assert squeezed.schedule["unfinished_prefills"] > 0, text
    assert ahead.faults["poison"] > 0, text
    assert drafts.schedule["accepted"] > 0, text
    assert "0 wrong tokens" in summary(reports)


@pytest.mark.server
def test_clients_that_disconnect_change_no_answer(tmp_path: Path) -> None:
    root = tmp_path.resolve()
    report = over_http.run(
        root / "http", root, seed=1, seconds=240, count=140, distinct=40
    )
    text = "\n".join(report.lines())
    assert not report.failed, text
    assert report.requests >= 140, text
    assert report.finished["reading"] and report.finished["tiers"], text
    assert report.faults["disconnect in a stream"] > 0, text
    assert report.faults["disconnect before the answer"] > 0, text
    assert report.faults["odd body: 400"] > 0, text
    assert report.faults["module change: 201"] > 0, text


def test_the_soak_starts_without_pytest() -> None:
    command = [sys.executable, "-m", "tests.soak", "--help"]
    root = Path(__file__).parents[2]
    ended = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert ended.returncode == 0 and "--minutes" in ended.stdout, ended.stderr
