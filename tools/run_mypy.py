# SPDX-License-Identifier: Apache-2.0
"""Type-check our files where they live: in the installed vLLM, as `vllm.*` modules."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def module_name(path: Path) -> str:
    """`vllm/a/b.py` -> `vllm.a.b`."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def main() -> None:
    """Run mypy over every module of the overlay, then over the command's parser."""
    modules = sorted({module_name(path) for path in Path("vllm").rglob("*.py")})
    args = [item for name in modules for item in ("-m", name)]
    # From another directory, so that `vllm` is the installed package.
    config = str(Path("pyproject.toml").resolve())
    command = [sys.executable, "-m", "mypy", "--config-file", config]
    failed = subprocess.call([*command, *args], cwd="tools")
    failed |= subprocess.call([*command, "vllm_steering_cli"])
    sys.exit(failed)


if __name__ == "__main__":
    main()
