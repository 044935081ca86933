# SPDX-License-Identifier: Apache-2.0
"""Steering vectors: safetensors files and GGUF control vectors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sae_reference import D, new_weights, tensor
from safetensors.torch import save_file

from vllm.config.steering import SiteInfo
from vllm.config.steering_points import HookPoint
from vllm.model_executor.model_loader.sae_loader import (
    inspect_module,
    load_site,
    load_vectors,
)

VECTORS = {
    "layers.4.post_block": tensor(D, seed=0),
    "layers.2.resid_pre": tensor(D, seed=1).to(torch.bfloat16),
}


def test_a_safetensors_file_has_one_vector_per_site(tmp_path: Path) -> None:
    path = tmp_path / "calm.safetensors"
    save_file(VECTORS, path, metadata={"format": "vllm-steering-vectors"})
    module = inspect_module("calm", str(path))
    assert module.kind == "vectors"
    assert module.sites == (
        SiteInfo(2, HookPoint.PRE_ATTN, D, 1),
        SiteInfo(4, HookPoint.POST_BLOCK, D, 1),
    )
    found = [load_vectors(module, site) for site in module.sites]
    assert [vector.dtype for vector in found] == [torch.float32] * 2
    assert torch.equal(found[0], VECTORS["layers.2.resid_pre"].float())
    assert torch.equal(found[1], VECTORS["layers.4.post_block"])


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        (
            {"happy": tensor(D, seed=0)},
            None,
            "does not say its site: expected 1 in the option sites",
        ),
        ({"pre_attn.2": tensor(1, D, seed=0)}, None, "pre_attn.2: expected a vector"),
        (
            {"pre_attn.2": tensor(D, seed=0), "resid_pre.2": tensor(D, seed=1)},
            None,
            "expected one tensor for each site",
        ),
        ({"pre_attn.2": torch.ones(D).int()}, None, "pre_attn.2: expected a floating"),
        (VECTORS, {"format": "other"}, "format: expected 'vllm-steering-vectors'"),
        ({}, None, "expected steering vectors, found none"),
    ],
)
def test_a_file_that_is_not_of_vectors_is_refused(
    tmp_path: Path,
    tensors: dict[str, torch.Tensor],
    metadata: dict[str, str] | None,
    message: str,
) -> None:
    save_file(tensors, tmp_path / "v.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match=message):
        inspect_module("m", str(tmp_path / "v.safetensors"))


def test_a_vector_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    save_file({"pre_attn.2": torch.full((D,), torch.nan)}, tmp_path / "v.safetensors")
    module = inspect_module("m", str(tmp_path / "v.safetensors"))
    with pytest.raises(ValueError, match="pre_attn.2: expected finite"):
        load_vectors(module, module.sites[0])


def test_vectors_are_no_sae(tmp_path: Path) -> None:
    save_file({"pre_attn.2": torch.ones(D)}, tmp_path / "v.safetensors")
    module = inspect_module("m", str(tmp_path / "v.safetensors"))
    with pytest.raises(ValueError, match="expected an SAE, found a steering vector"):
        load_site(module, module.sites[0], new_weights(module.sites[0]))


def control_vector(path: Path, architecture: str, names: list[str]) -> Path:
    """Written as repeng's `ControlVector.export_gguf` does."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string(f"{architecture}.model_hint", "mistral")
    writer.add_uint32(f"{architecture}.layer_count", len(names))
    for i, name in enumerate(names):
        writer.add_tensor(name, tensor(D, seed=i).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_control_vector_is_added_to_the_output_of_its_layers(tmp_path: Path) -> None:
    names = ["direction.11", "direction.3"]
    path = control_vector(tmp_path / "happy.gguf", "controlvector", names)
    module = inspect_module("m", str(path))
    assert [site.name for site in module.sites] == ["post_block.3", "post_block.11"]
    assert torch.equal(load_vectors(module, module.sites[0]), tensor(D, seed=1))
    assert torch.equal(load_vectors(module, module.sites[1]), tensor(D, seed=0))


def test_a_gguf_model_is_refused(tmp_path: Path) -> None:
    path = control_vector(tmp_path / "m.gguf", "llama", ["token_embd.weight"])
    with pytest.raises(ValueError, match="architecture: expected 'controlvector', fou"):
        inspect_module("m", str(path))


def test_a_control_vector_with_other_tensors_is_refused(tmp_path: Path) -> None:
    path = control_vector(tmp_path / "m.gguf", "controlvector", ["direction.x"])
    with pytest.raises(ValueError, match="direction.x: expected tensors named"):
        inspect_module("m", str(path))


SUFFIXES = [".npy", ".pt", ".safetensors"]


def bare(path: Path, value: torch.Tensor) -> Path:
    """One tensor in a file, by its suffix."""
    if path.suffix == ".npy":
        np.save(path, value.numpy())
    elif path.suffix == ".pt":
        torch.save(value, path)
    else:
        save_file({"vector": value}, path)
    return path


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_bare_vector_takes_its_site_from_the_operator(
    tmp_path: Path, suffix: str
) -> None:
    value = tensor(D, seed=3)
    path = bare(tmp_path / f"v{suffix}", value)
    module = inspect_module("m", str(path), sites=["blocks.4.hook_resid_mid"])
    assert (module.kind, [s.name for s in module.sites]) == ("vectors", ["post_attn.4"])
    assert torch.equal(load_vectors(module, module.sites[0]), value)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_rows_of_a_bare_matrix_go_to_the_sites_in_their_order(
    tmp_path: Path, suffix: str
) -> None:
    rows = tensor(2, D, seed=3)
    path = bare(tmp_path / f"v{suffix}", rows)
    module = inspect_module("m", str(path), sites=["post_block.9", "post_block.4"])
    for site, row in zip(module.sites, rows, strict=True):
        assert torch.equal(load_vectors(module, site), row)
    assert [site.layer for site in module.sites] == [9, 4]


@pytest.mark.parametrize(
    ("shape", "sites", "message"),
    [
        ((D,), None, "does not say its site: expected 1"),
        (
            (D,),
            ["post_block.1", "post_block.2"],
            "expected 1 in the option sites.*found 2",
        ),
        ((2, D), ["post_block.1"], "expected 2 in the option sites.*found 1"),
        ((2, D, 1), ["post_block.1"], "expected a steering vector"),
    ],
)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_bare_vector_without_its_sites_is_refused(
    tmp_path: Path,
    suffix: str,
    shape: tuple[int, ...],
    sites: list[str] | None,
    message: str,
) -> None:
    path = bare(tmp_path / f"v{suffix}", torch.ones(*shape))
    with pytest.raises(ValueError, match=message):
        inspect_module("m", str(path), sites=sites)
