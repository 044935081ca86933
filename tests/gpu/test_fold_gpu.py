# SPDX-License-Identifier: Apache-2.0
"""An SAE folded on the GPU has the bits of the one that NumPy folds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from steering_testing.folds import LAYOUTS, D, stored

from vllm.model_executor.layers import steering_chunks
from vllm.model_executor.layers.steering_state import SAEWeights
from vllm.model_executor.model_loader.sae_formats import fold
from vllm.model_executor.model_loader.sae_formats.fold_host import fold_host
from vllm.model_executor.model_loader.sae_formats.tensor_files import open_tensors
from vllm.model_executor.model_loader.sae_formats.tensor_types import FloatType

KINDS = {FloatType.F32: torch.float32, FloatType.BF16: torch.bfloat16}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_fold_has_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: FloatType
) -> None:
    monkeypatch.setattr(steering_chunks, "CHUNK_BYTES", 4 * D * 16)  # several chunks
    layout = LAYOUTS[name]
    path = tmp_path / layout.file
    for dtype in (torch.float32, torch.bfloat16):
        save_file(stored(dtype), path)
        weights = SAEWeights.for_site(layout.site, KINDS[kind], torch.device("cuda"))
        with open_tensors(path) as tensors:
            fold.fold_sae(layout, tensors, weights, lambda size: None)
            found = fold_host(layout, tensors, kind).tensors()
        for key, tensor in found.items():
            on_gpu = getattr(weights, key).cpu().contiguous().view(torch.uint8)
            same = np.array_equal(tensor.data.view(np.uint8), on_gpu.numpy())
            assert same, (key, dtype)
