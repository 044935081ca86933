# SPDX-License-Identifier: Apache-2.0
"""The fold without PyTorch gives the same bits as the one that an engine runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from steering_testing.folds import LAYOUTS, PLAIN, D, stored

from vllm.model_executor.layers import steering_chunks
from vllm.model_executor.layers.steering_state import SAEWeights
from vllm.model_executor.model_loader.sae_formats import fold
from vllm.model_executor.model_loader.sae_formats.fold_host import HostSAE, fold_host
from vllm.model_executor.model_loader.sae_formats.layout import (
    LayoutError,
    SAELayout,
)
from vllm.model_executor.model_loader.sae_formats.safetensors_file import (
    write_safetensors,
)
from vllm.model_executor.model_loader.sae_formats.tensor_files import open_tensors
from vllm.model_executor.model_loader.sae_formats.tensor_types import (
    FloatType,
    HostTensor,
)

TYPES = {
    FloatType.F32: torch.float32,
    FloatType.F16: torch.float16,
    FloatType.BF16: torch.bfloat16,
}


def by_torch(path: Path, layout: SAELayout, kind: FloatType) -> SAEWeights:
    """What an engine on a CPU holds."""
    weights = SAEWeights.for_site(layout.site, TYPES[kind], torch.device("cpu"))
    with open_tensors(path) as tensors:
        fold.fold_sae(layout, tensors, weights, lambda size: None)
    return weights


def by_numpy(path: Path, layout: SAELayout, kind: FloatType) -> HostSAE:
    """What the commands write."""
    with open_tensors(path) as tensors:
        return fold_host(layout, tensors, kind)


def bits(value: torch.Tensor) -> np.ndarray:
    """The bytes of a tensor."""
    return value.contiguous().view(torch.uint8).numpy()


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_fold_has_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: FloatType
) -> None:
    monkeypatch.setattr(steering_chunks, "CHUNK_BYTES", 4 * D * 16)  # several chunks
    layout = LAYOUTS[name]
    path = tmp_path / layout.file
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        save_file(stored(dtype), path)
        expected = by_torch(path, layout, kind)
        found = by_numpy(path, layout, kind).tensors()
        names = ["W_enc", "b_enc", "W_dec", "b_dec", "threshold"]
        names += ["W_skip"] if expected.W_skip is not None else []
        assert sorted(found) == sorted(names)
        for key, tensor in found.items():
            same = bits(getattr(expected, key))
            assert np.array_equal(tensor.data.view(np.uint8), same), (key, dtype)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(
    ("tensor", "place", "value"),
    [
        ("W_enc", (33, 2), torch.nan),
        ("W_dec", (69, 36), -torch.inf),
        ("W_enc", (0, 0), 3.4e38),
        ("b_dec", (4,), torch.inf),
        ("b_enc", (4,), torch.nan),
        ("threshold", (4,), torch.nan),
    ],
)
def test_what_is_not_finite_is_refused_in_the_same_words(
    tmp_path: Path,
    kind: FloatType,
    tensor: str,
    place: tuple[int, ...],
    value: float,
) -> None:
    layout = replace(PLAIN, W_enc_scale=2.0, subtract_b_dec=True)
    tensors = stored(torch.float32)
    tensors[tensor][place] = value
    path = tmp_path / layout.file
    save_file(tensors, path)
    with pytest.raises(LayoutError, match=tensor) as expected:
        by_torch(path, layout, kind)
    with pytest.raises(LayoutError) as found:
        by_numpy(path, layout, kind)
    assert str(found.value) == str(expected.value)


def test_sums_of_rows_are_sums_of_rows() -> None:
    for width in (1, 2, 3, 8, 37, 64):
        W = torch.randn(5, width, dtype=torch.float64)
        torch.testing.assert_close(steering_chunks.row_sums(W.clone()), W.sum(dim=1))


@pytest.mark.parametrize("kind", TYPES)
def test_rounding_is_that_of_torch(kind: FloatType) -> None:
    every = torch.arange(0, 2**32, 65521, dtype=torch.int64).to(torch.uint32)
    edges = [0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0x00000001, 0x80008000]
    values = torch.cat([every, torch.tensor(edges, dtype=torch.uint32)])
    floats = values.view(torch.float32)
    floats = floats[torch.isfinite(floats)]
    rounded = HostTensor.rounded(floats.numpy(), kind)
    assert np.array_equal(rounded.data.view(np.uint8), bits(floats.to(TYPES[kind])))
    back = floats.to(TYPES[kind]).float()
    assert np.array_equal(rounded.floats().view(np.uint8), bits(back))


@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_rounding_to_bfloat16_keeps_what_is_not_finite(value: float) -> None:
    found = HostTensor.rounded(np.array([value], np.float32), FloatType.BF16)
    assert not np.isfinite(found.floats()).any()


def test_a_written_file_is_that_of_the_safetensors_package(tmp_path: Path) -> None:
    tensors = {
        "W_enc": torch.randn(7, 3).to(torch.bfloat16),
        "b": torch.randn(5),
        "a": torch.randn(2, 2).to(torch.float16),
        "ä": torch.randn(3, dtype=torch.float64),
        "none": torch.empty(0, 4),
    }
    save_file(tensors, tmp_path / "theirs.safetensors")
    host = {
        name: HostTensor(
            (value.view(torch.uint16) if value.dtype is torch.bfloat16 else value)
            .numpy(),
            FloatType(str(value.dtype).removeprefix("torch.")),
        )
        for name, value in tensors.items()
    }  # fmt: skip
    write_safetensors(tmp_path / "ours.safetensors", host)
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    assert ours.read_bytes() == theirs.read_bytes()
    again = load_file(ours)
    assert all(torch.equal(again[name], value) for name, value in tensors.items())
