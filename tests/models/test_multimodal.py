# SPDX-License-Identifier: Apache-2.0
"""Multimodal checkpoints, in a process of its own that can import torchvision.

vLLM's multimodal classes import torchvision. `make venv` puts it beside the
environment, not into it (see tools/stub_torchvision.py), so that every other test runs
as where it is missing.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from steering_testing.cases import MULTIMODAL_BACKEND_CASES, MULTIMODAL_CASES
from steering_testing.pytest_process import run_pytest

from tools.stub_torchvision import STUB, stub

# The process has several tests, each with a time limit of its own.
pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

TORCHVISION = Path(sys.prefix) / "torchvision"
CASES = Path(__file__).with_name("multimodal_cases.py")
BACKEND_CASES = Path(__file__).with_name("multimodal_backend_cases.py")


def run(folder: Path, *selected: str, cases: Path = CASES) -> None:
    """Run the cases of each selection in one process; all must pass."""
    if not (TORCHVISION / "torchvision").is_dir():
        pytest.skip(f"no torchvision in {TORCHVISION}")
    inherited = os.environ.get("PYTHONPATH", "")
    options = ["-vx", "--tb=short", "--show-capture=no", str(cases)]
    printed = run_pytest(
        folder,
        {"cases": [*options, "-k", " or ".join(selected)]},
        {"PYTHONPATH": f"{TORCHVISION}:{inherited}"},
    )["cases"]
    passed = [line for line in printed.splitlines() if " PASSED" in line]
    for selection in selected:
        assert any(selection in line for line in passed), f"no case is {selection}"


def test_gemma_3_equals_hugging_face_on_text_and_at_image_positions(
    tmp_path: Path,
) -> None:
    run(tmp_path, "[gemma3_mm]", "image_positions")


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted({*MULTIMODAL_CASES, "table"} - {"gemma3_mm"}))
def test_a_multimodal_checkpoint_equals_hugging_face_on_text(
    tmp_path: Path, family: str
) -> None:
    run(tmp_path, f"[{family}]" if family != "table" else "names_in_the_table")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MULTIMODAL_BACKEND_CASES))
def test_a_multimodal_checkpoint_under_the_transformers_backend_equals_hugging_face(
    tmp_path: Path, name: str
) -> None:
    run(tmp_path, f"[{name}]", cases=BACKEND_CASES)


def test_the_stub_replaces_a_file_that_others_share(tmp_path: Path) -> None:
    package = tmp_path / "site" / "torchvision"
    package.mkdir(parents=True)
    shared = tmp_path / "shared.py"
    shared.write_text("raise ImportError")
    os.link(shared, package / "_meta_registrations.py")
    stub(tmp_path / "site")
    assert shared.read_text() == "raise ImportError"
    assert (package / "_meta_registrations.py").read_text() == STUB


def test_the_stub_needs_torchvision(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected torchvision under"):
        stub(tmp_path)
