# SPDX-License-Identifier: Apache-2.0
"""Fail unless the CUDA and C++ sources are formatted as `.clang-format` says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SUFFIXES = {".cu", ".cuh", ".cpp", ".h"}


def main() -> None:
    """Dry-run clang-format over `csrc/`."""
    sources = [str(p) for p in sorted(Path("csrc").rglob("*")) if p.suffix in SUFFIXES]
    if not sources:
        return
    tool = str(Path(sys.executable).parent / "clang-format")
    sys.exit(subprocess.call([tool, "--dry-run", "--Werror", *sources]))


if __name__ == "__main__":
    main()
