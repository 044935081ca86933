# SPDX-License-Identifier: Apache-2.0
"""`tools/link_overlay.py --site`: beside a vLLM in a directory of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXTENSION = "_steering_C.abi3.so"


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """What `pip install --target` leaves of a vLLM, as far as this matters."""
    (tmp_path / "site" / "vllm" / "config").mkdir(parents=True)
    (tmp_path / "site" / "vllm" / "__init__.py").write_text("")
    return tmp_path / "site"


def install(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "link_overlay.py")]
    command += ["--site", str(site), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_path_entry_is_enough_to_find_the_plugin(site: Path, tmp_path: Path) -> None:
    (tmp_path / EXTENSION).write_text("")
    assert install(site, "--extension", str(tmp_path / EXTENSION)).returncode == 0
    packages = [ROOT / "vllm", ROOT / "vllm_steering_cli"]
    ours = {str(p.relative_to(ROOT)) for root in packages for p in root.rglob("*.py")}
    there = {str(p.relative_to(site)) for p in site.rglob("*")}
    assert ours | {f"vllm/{EXTENSION}"} <= there
    code = (
        f"import importlib.metadata as m; [d] = m.distributions(path=[{str(site)!r}]); "
        "print(d.name, *(e.value for e in d.entry_points))"
    )
    said = subprocess.check_output([sys.executable, "-S", "-c", code], text=True)
    assert said.startswith("vllm-steering ")
    assert "vllm.plugins.steering:register" in said


def test_another_run_replaces_our_files_and_drops_what_is_gone(
    site: Path, tmp_path: Path
) -> None:
    (tmp_path / EXTENSION).write_text("")
    install(site, "--extension", str(tmp_path / EXTENSION))
    ours = site / "vllm" / "config" / "steering.py"
    ours.write_text("old")
    assert install(site).returncode == 0
    assert ours.read_text() == (ROOT / "vllm/config/steering.py").read_text()
    assert not (site / "vllm" / EXTENSION).exists()


def test_a_file_that_is_not_ours_is_refused(site: Path) -> None:
    (site / "vllm" / "config" / "steering.py").write_text("stock")
    result = install(site)
    assert result.returncode != 0
    assert "not ours to replace" in result.stderr
    assert (site / "vllm" / "config" / "steering.py").read_text() == "stock"


def test_a_directory_without_vllm_is_refused(tmp_path: Path) -> None:
    result = install(tmp_path)
    assert result.returncode != 0
    assert "there is no vLLM" in result.stderr
