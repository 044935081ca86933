# SPDX-License-Identifier: Apache-2.0
"""Files made to run code, exhaust memory or crash a parser: a ValueError, no more."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sae_reference import D, F, new_weights, tensor, write_json
from safetensors.torch import save_file

from vllm.model_executor.model_loader.sae_loader import (
    inspect_module,
    load_site,
    load_vectors,
    save_native,
)

W, b_enc, b_dec = tensor(F, D, seed=0), tensor(F, seed=1), tensor(D, seed=2)


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
    refused(path, "ae.pt: cannot be read: UnpicklingError")
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
    path = gemma_scope(tmp_path / "layer_1", threshold=objects)
    refused(path, "threshold: expected numbers, found pickled Python objects")
    assert not marker.exists()


def test_an_npz_that_inflates_a_thousandfold_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "layer_1"
    path.mkdir()
    np.savez_compressed(path / "params.npz", W_enc=np.zeros((1024, 4096), np.float32))
    refused(path, "params.npz: inflates from .* expected at most 8 times")


def test_an_npz_whose_shape_is_not_its_size_is_refused(tmp_path: Path) -> None:
    path = gemma_scope(tmp_path / "layer_1")
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
    refused(path, "decoder.weight: expected a dense tensor")


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


def make_native(root: Path) -> Path:
    tensors = {"W_enc": W, "b_enc": b_enc, "W_dec": W, "b_dec": b_dec}
    save_native(root / "n", {(1, "resid_post"): tensors})
    return root / "n"


def make_vectors(root: Path) -> Path:
    save_file({"1.resid_post": b_dec}, root / "v.safetensors")
    return root / "v.safetensors"


def make_gguf(root: Path) -> Path:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(root / "c.gguf", "controlvector")
    writer.add_tensor("direction.1", b_dec.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return root / "c.gguf"


MAKERS: list[Callable[[Path], Path]] = [
    make_native,
    make_vectors,
    make_gguf,
    lambda root: gemma_scope(root / "layer_1"),
    lambda root: dictionary(root / "d", good_state()),
]


@pytest.mark.parametrize("make", MAKERS)
@given(data=st.data())
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_a_corrupted_file_loads_or_is_a_value_error(
    tmp_path_factory: pytest.TempPathFactory,
    make: Callable[[Path], Path],
    data: st.DataObject,
) -> None:
    path = make(tmp_path_factory.mktemp("fuzz"))
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    victim = data.draw(st.sampled_from(files))
    content = bytearray(victim.read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    for _ in range(data.draw(st.integers(0, 4))):
        if content:
            where = data.draw(st.integers(0, len(content) - 1))
            content[where] = data.draw(st.integers(0, 255))
    victim.write_bytes(content)
    try:
        module = inspect_module("m", str(path))
        for site in module.sites:
            if module.kind == "sae":
                load_site(module, site, new_weights(site))
            else:
                load_vectors(module, site)
    except ValueError as error:
        assert str(error).startswith("steering module 'm'")
        assert "\n" not in str(error)
