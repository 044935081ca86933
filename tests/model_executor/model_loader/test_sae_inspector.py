# SPDX-License-Identifier: Apache-2.0
"""Inspecting a module in a process of its own: same answers, and limits that hold."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sae_reference import D, F, tensor
from safetensors.torch import save_file

from vllm.model_executor.layers.steering_state import SAEWeights
from vllm.model_executor.model_loader.sae_formats.native import save_native
from vllm.model_executor.model_loader.sae_inspector import (
    InspectionLimits,
    ModuleInspector,
    PipeLines,
)
from vllm.model_executor.model_loader.sae_inspector_process import why_silent
from vllm.model_executor.model_loader.sae_loader import inspect_module, load_site

TENSORS = {
    "W_enc": tensor(F, D, seed=0),
    "b_enc": tensor(F, seed=1),
    "W_dec": tensor(F, D, seed=2),
    "b_dec": tensor(D, seed=3),
}


@pytest.fixture(scope="module")
def inspector() -> Iterator[ModuleInspector]:
    """One helper process for this file's tests."""
    inspector = ModuleInspector()
    yield inspector
    inspector.close()


@pytest.fixture
def good(tmp_path: Path) -> str:
    save_native(tmp_path / "good", {(3, "resid_post"): TENSORS})
    return str(tmp_path / "good")


def sparse_vectors(path: Path, size: int) -> str:
    """A valid safetensors file of one vector whose data is a hole."""
    shape = [size // 4]
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}
    header = json.dumps({"post_block.3": entry}).encode()
    with path.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + size)
    return str(path)


def test_the_answer_is_that_of_inspect_module(
    inspector: ModuleInspector, good: str
) -> None:
    options = {"feature_units": "unit_decoder", "skip_token_ids": [1, 2]}
    assert inspector.inspect("m", good, **options) == inspect_module(
        "m", good, **options
    )


def test_a_refusal_is_one_line_without_the_names_of_other_files(
    inspector: ModuleInspector, tmp_path: Path
) -> None:
    (tmp_path / "secret.txt").write_text("x")
    with pytest.raises(ValueError, match="no known format: found other files") as error:
        inspector.inspect("m", str(tmp_path))
    assert "secret" not in str(error.value)
    assert "\n" not in str(error.value)
    assert "sae_lens, gemma_scope, " in str(error.value)
    with pytest.raises(ValueError, match="found a directory with secret.txt"):
        inspect_module("m", str(tmp_path))


def test_an_unknown_format_is_answered_in_short_with_what_comes_close(
    inspector: ModuleInspector, tmp_path: Path
) -> None:
    def message(ask: Callable[[str, str], object]) -> str:
        with pytest.raises(ValueError, match="no known format") as error:
            ask("m", str(tmp_path))
        text = str(error.value).replace(str(tmp_path), "")
        assert text.endswith(
            "; docs/features/formats.md lists the files of each format"
        )
        assert len(text) < 350
        return text

    assert "found a directory with nothing, " in message(inspect_module)
    (tmp_path / "cfg.json").write_text("{}")
    assert (
        message(inspect_module)
        .partition("expected one of: ")[2]
        .startswith(
            "sae_lens (cfg.json and sae_weights.safetensors), "
            "sparsify (cfg.json and sae.safetensors); "
        )
    )
    # Who may not see the names learns nothing of them.
    assert "cfg.json" not in message(inspector.inspect)


def test_hashing_has_a_limit_on_time(
    inspector: ModuleInspector, tmp_path: Path, good: str
) -> None:
    path = sparse_vectors(tmp_path / "v.safetensors", 64 << 30)
    limits = inspector.limits
    inspector.limits = replace(limits, seconds=2.0, bytes_per_second=1e15)
    start = time.monotonic()
    try:
        with pytest.raises(ValueError, match=r"took more than the 2 s allowed"):
            inspector.inspect("m", path)
    finally:
        inspector.limits = limits
    assert time.monotonic() - start < 10
    assert inspector.inspect("m", good).sites


def test_a_module_has_a_limit_on_its_size(
    inspector: ModuleInspector, tmp_path: Path
) -> None:
    path = sparse_vectors(tmp_path / "v.safetensors", 1 << 40)
    with pytest.raises(ValueError, match="expected at most 137438953472 bytes, found"):
        inspector.inspect("m", path)


def test_memory_has_a_limit(
    inspector: ModuleInspector, tmp_path: Path, good: str
) -> None:
    # Four megabytes of JSON become many more of Python objects.
    (tmp_path / "manifest.json").write_text("[" + "[]," * 1_300_000 + "[]]")
    limits = inspector.limits
    inspector.limits = InspectionLimits(memory_bytes=16 << 20)
    try:
        with pytest.raises(ValueError, match="needs more than the 16 MiB of memory"):
            inspector.inspect("m", str(tmp_path))
    finally:
        inspector.limits = limits
    assert inspector.inspect("m", good).sites


def read(inspector: ModuleInspector, path: str, seconds: float = 60.0) -> SAEWeights:
    """The module's one SAE, read by the helper."""
    module = inspect_module("m", path)
    (site,) = module.sites
    weights = SAEWeights.for_site(site, torch.bfloat16, torch.device("cpu"))
    inspector.load(module, site, weights.tensors(), seconds)
    return weights


def test_loaded_tensors_are_those_of_load_site(
    inspector: ModuleInspector, good: str, tmp_path: Path
) -> None:
    module = inspect_module("m", good)
    (site,) = module.sites
    expected = SAEWeights.for_site(site, torch.bfloat16, torch.device("cpu"))
    load_site(module, site, expected)
    found = read(inspector, good)
    for name, tensor_ in expected.named_buffers():
        assert torch.equal(tensor_, found.get_buffer(name)), name
    save_file({"post_block.3": TENSORS["b_dec"]}, tmp_path / "v.safetensors")
    vectors = inspect_module("v", str(tmp_path / "v.safetensors"))
    into = torch.empty(D)
    inspector.load(vectors, vectors.sites[0], [into], 60.0)
    assert torch.equal(into, TENSORS["b_dec"])


def test_loading_refuses_what_load_site_refuses(
    inspector: ModuleInspector, tmp_path: Path, good: str
) -> None:
    bad = {**TENSORS, "W_dec": TENSORS["W_dec"].clone()}
    bad["W_dec"][1, 2] = float("nan")
    save_native(tmp_path / "bad", {(3, "resid_post"): bad})
    with pytest.raises(ValueError, match="W_dec: expected finite .* feature 1"):
        read(inspector, str(tmp_path / "bad"))
    module = inspect_module("m", good)
    (Path(good) / "manifest.json").write_text("[]")
    with pytest.raises(ValueError, match="steering module 'm'"):
        inspector.load(module, module.sites[0], [torch.empty(1)], 60.0)


def test_loading_has_limits_on_time_and_memory(
    inspector: ModuleInspector, tmp_path: Path, good: str
) -> None:
    with pytest.raises(ValueError, match="loading it took more than the 0 s allowed"):
        read(inspector, good, seconds=0.0)
    side = 1024
    large = {
        "W_enc": tensor(side, side, seed=0),
        "b_enc": tensor(side, seed=1),
        "W_dec": tensor(side, side, seed=2),
        "b_dec": tensor(side, seed=3),
    }
    save_native(tmp_path / "large", {(3, "resid_post"): large})
    limits = inspector.limits
    # Less than the tensors themselves.
    inspector.limits = replace(limits, memory_bytes=-(3 * 4 << 20))
    try:
        with pytest.raises(ValueError, match="loading it needs more than the"):
            read(inspector, str(tmp_path / "large"))
    finally:
        inspector.limits = limits
    assert torch.equal(read(inspector, good).b_dec, TENSORS["b_dec"])


def test_a_pipe_may_have_any_number() -> None:
    read_end, write_end = os.pipe()
    large = fcntl.fcntl(read_end, fcntl.F_DUPFD, 1500)
    os.close(read_end)
    lines = PipeLines(large)
    os.write(write_end, b"one\ntwo")
    assert lines.next(5.0) == b"one\n"
    assert lines.next(0.0) == b""
    os.close(write_end)
    assert lines.next(5.0) == b""
    lines.close()


def test_who_waits_for_lines_notices_that_nobody_asks() -> None:
    (read_end, write_end), (asker, question) = os.pipe(), os.pipe()
    lines = PipeLines(read_end, asker)
    os.write(question, b"?")
    assert lines.next(0.05) == b"" and not lines.unasked
    threading.Timer(0.1, os.close, [question]).start()
    start = time.monotonic()
    assert lines.next(60.0) == b"" and lines.unasked
    assert time.monotonic() - start < 30
    lines.close()
    os.close(write_end)
    os.close(asker)


ENGINE = """
import sys
from dataclasses import replace
from vllm.model_executor.model_loader.sae_inspector import ModuleInspector
inspector = ModuleInspector()
inspector.limits = replace(inspector.limits, seconds=600.0)
inspector.warm_up()
print(inspector._process.pid, flush=True)
inspector.inspect("m", sys.argv[1])
"""


def children_of(process: int) -> list[int]:
    path = Path(f"/proc/{process}/task/{process}/children")
    return [int(word) for word in path.read_text().split()]


@pytest.mark.slow
def test_nothing_goes_on_reading_after_the_engine_was_killed(tmp_path: Path) -> None:
    path = sparse_vectors(tmp_path / "v.safetensors", 64 << 30)
    command = [sys.executable, "-c", ENGINE, path]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as engine:
        assert engine.stdout is not None
        helper = int(engine.stdout.readline())
        deadline = time.monotonic() + 60
        while not (reading := children_of(helper)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        engine.kill()
    deadline = time.monotonic() + 30
    left = [helper, *reading]
    while any(Path(f"/proc/{one}").exists() for one in left):
        assert time.monotonic() < deadline, "something still reads"
        time.sleep(0.05)


@pytest.mark.slow
def test_a_helper_that_was_killed_is_started_again(good: str) -> None:
    inspector = ModuleInspector()
    try:
        inspector.inspect("m", good)
        assert inspector._process is not None
        os.kill(inspector._process.pid, signal.SIGKILL)
        assert inspector.inspect("m", good) == inspect_module("m", good)
    finally:
        inspector.close()


def test_a_child_that_lost_its_file_is_not_said_to_lack_memory() -> None:
    """The status of a process that read a mapped file behind its new end."""
    assert "a file became shorter" in why_silent(signal.SIGBUS, 5.0)
    assert why_silent(signal.SIGKILL, 5.0) == "took more than the 5 s allowed"
    assert "perhaps out of memory" in why_silent(1 << 8, 5.0)


@pytest.mark.parametrize("name", ["manifest.json", "post_block.3.safetensors"])
def test_a_file_that_cannot_be_read_is_named(
    inspector: ModuleInspector, good: str, tmp_path: Path, name: str
) -> None:
    shutil.copytree(good, tmp_path / "m")
    (tmp_path / "m" / name).unlink()
    (tmp_path / "m" / name).symlink_to("/proc/self/mem")  # reading it is an I/O error
    with pytest.raises(ValueError, match=f"{name}: cannot be read.*Input/output error"):
        inspector.inspect("m", str(tmp_path / "m"))
