# SPDX-License-Identifier: Apache-2.0
"""Hostile files that try to run code, exhaust memory or crash a parser: ValueError."""

from __future__ import annotations

import io
import os
import pickle
import struct
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sae_reference import D, F, tensor, write_json

from vllm.model_executor.model_loader.sae_formats.native import save_native
from vllm.model_executor.model_loader.sae_loader import inspect_module

W, b_enc, b_dec = tensor(F, D, seed=0), tensor(F, seed=1), tensor(D, seed=2)

RES = "gemma-scope-2b-pt-res/layer_1"


class Payload:
    """A pickle that would make a file if it were run."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def gemma_scope(path: Path, **arrays: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    base = {"W_enc": W.T, "W_dec": W, "b_enc": b_enc, "b_dec": b_dec}
    content = {name: value.numpy() for name, value in base.items()}
    np.savez(path / "params.npz", **{**content, "threshold": b_enc.numpy(), **arrays})
    return path


def dictionary(path: Path, state: Any) -> Path:
    config = {"dict_class": "AutoEncoder", "layer": 1}
    write_json(path / "config.json", {"trainer": config})
    torch.save(state, path / "ae.pt")
    return path


def good_state() -> dict[str, torch.Tensor]:
    return {
        "encoder.weight": W,
        "encoder.bias": b_enc,
        "decoder.weight": W.T,
        "bias": b_dec,
    }


def refused(path: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inspect_module("m", str(path))


def test_a_torch_file_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    path = dictionary(tmp_path / "m", {**good_state(), "x": Payload(marker)})
    refused(
        path, "ae.pt: expected a state dict .* found a call of posix.mkdir; it was n"
    )
    assert not marker.exists()


def test_a_bare_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    path = dictionary(tmp_path / "m", good_state())
    (path / "ae.pt").write_bytes(pickle.dumps(Payload(marker)))
    refused(path, "ae.pt: expected a torch zip file")
    assert not marker.exists()


def test_an_npz_member_with_pickled_objects_is_refused(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    objects = np.array([Payload(marker)], dtype=object)
    path = gemma_scope(tmp_path / RES, threshold=objects)
    refused(path, "threshold: expected numbers, found pickled Python objects")
    assert not marker.exists()


def test_an_npz_that_inflates_a_thousandfold_is_refused(tmp_path: Path) -> None:
    path = tmp_path / RES
    path.mkdir(parents=True)
    np.savez_compressed(path / "params.npz", W_enc=np.zeros((1024, 4096), np.float32))
    refused(path, "params.npz: inflates from .* expected at most 8 times")


def test_an_npz_whose_shape_is_not_its_size_is_refused(tmp_path: Path) -> None:
    path = gemma_scope(tmp_path / RES)
    header = io.BytesIO()
    declared = {"descr": "<f4", "fortran_order": False, "shape": (1 << 30, 1 << 10)}
    np.lib.format.write_array_header_1_0(header, declared)
    with zipfile.ZipFile(path / "params.npz", "w") as archive:
        archive.writestr("W_dec.npy", header.getvalue() + b"\0" * 64)
    refused(path, r"params.npz: W_dec: shape \(1073741824, 1024\) of float32 needs")


def test_a_huge_safetensors_header_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    path.write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    refused(path, "safetensors header of 1099511627776 bytes, expected at most")


@pytest.mark.parametrize("content", [b"", b"\x02\0\0\0\0\0\0\0{}", b"\x08" * 64])
def test_a_truncated_safetensors_file_is_refused(
    tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "v.safetensors"
    path.write_bytes(content)
    refused(path, "v.safetensors: |expected steering vectors")


def test_a_torch_view_larger_than_its_file_is_refused(tmp_path: Path) -> None:
    wide = torch.zeros(1).expand(1 << 20, 1 << 16)
    path = dictionary(tmp_path, {**good_state(), "decoder.weight": wide})
    refused(path, "decoder.weight: expected a dense tensor no larger than the file")


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(D, F, device="meta"),
        torch.zeros(D, F).to_sparse(),
    ],
)
def test_a_torch_tensor_without_dense_data_is_refused(
    tmp_path: Path, value: torch.Tensor
) -> None:
    path = dictionary(tmp_path, {**good_state(), "decoder.weight": value})
    refused(
        path, "ae.pt: expected a state dict of tensors and plain data, found a call"
    )


def test_a_torch_file_that_is_no_state_dict_is_refused(tmp_path: Path) -> None:
    refused(dictionary(tmp_path, [W]), "ae.pt: expected a state dict, found list")


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"[" * 100_000])
def test_a_configuration_that_is_no_json_object_is_refused(
    tmp_path: Path, content: bytes
) -> None:
    path = dictionary(tmp_path, good_state())
    (path / "config.json").write_bytes(content)
    refused(path, "config.json: (cannot be read as JSON|expected a JSON object)")


def test_an_oversized_configuration_is_refused(tmp_path: Path) -> None:
    path = dictionary(tmp_path, good_state())
    (path / "config.json").write_bytes(b" " * (5 << 20))
    refused(path, "config.json: expected at most 4194304 bytes")


def memory(name: str) -> int:
    """Bytes of this process: `VmRSS`, or the most since `forget_peak`, `VmHWM`."""
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(f"{name}:")
    )
    return 1024 * int(line.split()[1])


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def quickly_refused(path: Path, message: str) -> None:
    """Refused by the readers themselves, as at start-up, where no other process sets
    limits: within a second of this process's time, however busy the machine is, and
    without the memory that the file asks for."""
    forget_peak()
    before, start = memory("VmRSS"), time.process_time()
    refused(path, message)
    assert time.process_time() - start < 1
    assert memory("VmHWM") - before < 64 << 20


def torch_file(path: Path, pickled: bytes) -> Path:
    """A directory of dictionary_learning whose `ae.pt` holds these pickled bytes."""
    dictionary(path, {})
    with zipfile.ZipFile(path / "ae.pt", "w") as archive:
        archive.writestr("a/data.pkl", pickled)
        archive.writestr("a/version", "3\n")
        archive.writestr("a/byteorder", "little")
    return path


def test_a_torch_file_whose_key_takes_hours_to_hash_is_refused(tmp_path: Path) -> None:
    key: tuple[Any, ...] = ()
    for _ in range(60):
        key = (key, key)
    path = torch_file(tmp_path / "m", pickled_dict(key))
    quickly_refused(path, "expected a state dict .*, found a key of type tuple")


def pickled_dict(key: Any) -> bytes:
    """`{key: 1}` without making it here: a dict would hash the key."""
    inner = pickle.dumps(key, protocol=2)
    return b"\x80\x02}" + inner[2:-1] + b"K\x01s."


def test_a_torch_file_that_refers_to_one_long_tuple_often_is_refused(
    tmp_path: Path,
) -> None:
    many = b"(" + b"K\x01" * 100_000 + b"tq\x01"
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(NK\x00h\x01h\x01tR"
    path = torch_file(tmp_path / "m", b"\x80\x02]" + many + call * 10_000 + b"e.")
    quickly_refused(path, "ae.pt: data.pkl: a tensor is malformed")


def test_a_torch_file_with_a_large_pickle_is_refused(tmp_path: Path) -> None:
    path = torch_file(tmp_path / "m", pickle.dumps({"x": "y" * (2 << 20)}))
    quickly_refused(path, "data.pkl: expected at most 1048576 bytes, found 20")


def test_a_zip_file_with_very_many_members_is_refused(tmp_path: Path) -> None:
    path = gemma_scope(tmp_path / RES)
    with zipfile.ZipFile(path / "params.npz", "w") as archive:
        for i in range(20_000):
            archive.writestr(f"{i}.npy", b"")
    quickly_refused(path, "params.npz: lists members in [0-9]+ bytes, expected at most")


def test_a_zip_file_that_states_two_directory_sizes_is_held_to_the_one_that_counts(
    tmp_path: Path,
) -> None:
    path = gemma_scope(tmp_path / RES)
    with zipfile.ZipFile(path / "params.npz", "w") as archive:
        for i in range(20_000):
            archive.writestr(f"{i}.npy", b"")
    data = (path / "params.npz").read_bytes()
    at = data.rfind(b"PK\5\6")
    count, size, start = struct.unpack_from("<HII", data, at + 10)
    entries = (size, start)
    record = struct.pack(
        "<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, count, count, *entries
    )
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, at, 1)
    end = bytearray(data[at:])
    end[12:16] = struct.pack("<I", 100)
    (path / "params.npz").write_bytes(data[:at] + record + locator + bytes(end))
    assert len(zipfile.ZipFile(path / "params.npz").namelist()) == 20_000
    quickly_refused(path, "params.npz: lists members in [0-9]+ bytes, expected at most")


def gguf_header(*parts: bytes, values: int) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, 0, values) + b"".join(parts)


@pytest.mark.parametrize("element", [0, 8, 9])
def test_a_gguf_array_of_huge_declared_length_is_refused(
    tmp_path: Path, element: int
) -> None:
    array = struct.pack("<Q1sIIQ", 1, b"k", 9, element, 1 << 50)
    (tmp_path / "v.gguf").write_bytes(gguf_header(array, values=1) + b"\0" * 4096)
    quickly_refused(tmp_path / "v.gguf", "declares [0-9]+ bytes where the header has")


def test_a_gguf_with_very_many_values_is_refused(tmp_path: Path) -> None:
    (tmp_path / "v.gguf").write_bytes(gguf_header(values=1 << 60) + b"\0" * (1 << 20))
    quickly_refused(tmp_path / "v.gguf", "declares [0-9]+ bytes where the header has")


@pytest.mark.parametrize("name", ["v.safetensors", "v.gguf"])
def test_a_sparse_file_of_a_terabyte_is_refused(tmp_path: Path, name: str) -> None:
    with (tmp_path / name).open("wb") as stream:
        stream.truncate(1 << 40)
    quickly_refused(tmp_path / name, "expected at most 137438953472 bytes, found 109")


@pytest.mark.parametrize("name", ["params.npz", "v.safetensors", "ae.pt", "cfg.json"])
def test_a_git_lfs_pointer_is_refused_and_says_what_to_do(
    tmp_path: Path, name: str
) -> None:
    if name == "v.safetensors":
        path = victim = tmp_path / name
    elif name == "params.npz":
        path = gemma_scope(tmp_path / RES)
        victim = path / name
    else:
        path = dictionary(tmp_path, good_state())
        victim = path / name.replace("cfg", "config")
    victim.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    quickly_refused(path, f"{victim.name}: .*found a git-lfs pointer.* `git lfs pull`")


def test_an_integer_of_very_many_digits_is_refused(tmp_path: Path) -> None:
    path = make_native(tmp_path)
    text = (path / "manifest.json").read_text()
    huge = text.replace('"layer": 1', f'"layer": {"9" * 100_000}')
    assert huge != text
    (path / "manifest.json").write_text(huge)
    quickly_refused(path, "manifest.json: .*an integer has 100000 digits, expected at")


def test_a_directory_of_very_many_entries_is_refused(tmp_path: Path) -> None:
    for i in range(4100):
        (tmp_path / str(i)).touch()
    quickly_refused(tmp_path, "expected a directory of at most 4096 entries")


@pytest.mark.parametrize("stored", [3, 7])
def test_a_k_in_the_weights_that_differs_from_the_configuration_is_refused(
    tmp_path: Path, stored: int
) -> None:
    state = {k: v for k, v in good_state().items() if k != "bias"}
    dictionary(tmp_path, {**state, "b_dec": b_dec, "k": torch.tensor(stored)})
    trainer = {"dict_class": "AutoEncoderTopK", "layer": 1, "k": 7}
    write_json(tmp_path / "config.json", {"trainer": trainer})
    if stored == 7:
        assert inspect_module("m", str(tmp_path)).sites[0].k == 7
    else:
        refused(tmp_path, "k: expected 3, which ae.pt has for k, found 7")


def make_native(root: Path) -> Path:
    tensors = {"W_enc": W, "b_enc": b_enc, "W_dec": W, "b_dec": b_dec}
    save_native(root / "n", {(1, "resid_post"): tensors})
    return root / "n"
