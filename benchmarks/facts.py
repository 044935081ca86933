# SPDX-License-Identifier: Apache-2.0
"""The GPU, versions and commit of a benchmark, and its result file."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def commit() -> str:
    """The measured commit: the checkout's, or `STEERING_COMMIT` of a copy."""
    if named := os.environ.get("STEERING_COMMIT"):
        return named
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip()


def environment() -> dict[str, Any]:
    """GPU, versions, commit and day."""
    import torch
    import triton

    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit() or "not a git checkout",
        "date": time.strftime("%Y-%m-%d"),
    }


def results_file(gpu: str) -> Path:
    """`benchmarks/results/<gpu>.json`."""
    return ROOT / "benchmarks" / "results" / f"{gpu.replace(' ', '_')}.json"
