# SPDX-License-Identifier: Apache-2.0
"""Fail unless every source file carries the SPDX header in its first lines."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SUFFIXES = {".py", ".cu", ".cuh", ".cpp", ".h"}
HEADER = "SPDX-License-Identifier: Apache-2.0"


def main() -> None:
    """Check the named files, or every file that git tracks or would track."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = sys.argv[1:] or subprocess.check_output(listing, text=True).splitlines()
    paths = [Path(name) for name in names if Path(name).suffix in SUFFIXES]
    missing = [
        str(path)
        for path in paths
        if path.exists() and HEADER not in path.read_text()[:400]
    ]
    if missing:
        sys.exit("no SPDX header: " + ", ".join(missing))


if __name__ == "__main__":
    main()
