# SPDX-License-Identifier: Apache-2.0
"""What loading takes from PyTorch's caching allocator while vLLM limits its splits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from steering_testing.allocator import MIB, Allocations, CachingAllocator
from steering_testing.folds import PLAIN
from torch import nn

from vllm.config.steering import SiteInfo
from vllm.model_executor.layers.steering_chunks import ChunkMemory
from vllm.model_executor.layers.steering_norms import fold_norm_gain
from vllm.model_executor.layers.steering_state import SAEWeights
from vllm.model_executor.model_loader.sae_formats import fold
from vllm.model_executor.model_loader.sae_formats.tensor_files import open_tensors

CPU = torch.device("cpu")
# Three chunks of 8 MiB, and the width of a large model.
F, D = 1200, 5376
SITES = 3
CHUNK = (8 * MIB) // (4 * D) * 4 * D


def test_chunks_that_come_and_go_take_segment_after_segment() -> None:
    """The rule that `ChunkMemory` is for."""
    allocator = CachingAllocator()
    for _ in range(10):
        for block in [allocator.take(4 * MIB), allocator.take(8 * MIB)]:
            allocator.give(block)
    assert allocator.reserved == 200 * MIB
    unlimited = CachingAllocator(max_split=1 << 62)
    for _ in range(10):
        for block in [unlimited.take(4 * MIB), unlimited.take(8 * MIB)]:
            unlimited.give(block)
    assert unlimited.reserved == 20 * MIB
    allocator = CachingAllocator()
    for size in (20, 24, 32, 24, 20, 32):
        allocator.give(allocator.take(size * MIB))
    assert allocator.reserved == (20 + 24 + 32) * MIB


@pytest.fixture
def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folding on the CPU takes the memory that folding on a GPU takes."""

    def memory(elements: int, device: torch.device, stored: int = 0) -> ChunkMemory:
        assert device == CPU
        return ChunkMemory(elements, device, stored or 4 * elements)

    monkeypatch.setattr(fold, "ChunkMemory", memory)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("as_on_a_device")
def test_a_fold_takes_one_block_and_the_next_fold_takes_it_again(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    layout = replace(
        PLAIN,
        site=replace(PLAIN.site, d_in=D, d_sae=F),
        file="t.safetensors",
        unit_decoder_rows=True,
        subtract_b_dec=True,
        centre_input=True,
    )
    tensors = {
        "W_enc": torch.ones(F, D, dtype=dtype),
        "W_dec": torch.ones(F, D, dtype=dtype),
        "b_enc": torch.zeros(F),
        "threshold": torch.zeros(F),
        "b_dec": torch.ones(D),
    }
    save_file(tensors, tmp_path / layout.file)
    weights = SAEWeights.for_site(layout.site, torch.bfloat16, CPU)
    allocator = CachingAllocator()
    for _ in range(SITES):
        with (
            open_tensors(tmp_path / layout.file) as file,
            Allocations(allocator) as seen,
        ):
            fold.fold_sae(layout, file, weights, lambda size: None)
        large = [size for size in seen.sizes if size > MIB]
        assert len(large) == 1
        assert 20 * MIB <= large[0] < 40 * MIB
    assert allocator.reserved <= large[0] + 4 * MIB


def test_folding_a_gain_takes_no_second_encoder() -> None:
    site: SiteInfo = replace(PLAIN.site, d_in=D, d_sae=F)
    weights = SAEWeights.for_site(site, torch.bfloat16, CPU)
    weights.W_enc.copy_(torch.arange(F, dtype=torch.float32)[:, None] / F)
    before = weights.W_enc.clone()
    norm = nn.LayerNorm(D)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, D))
        norm.bias.copy_(torch.linspace(-1, 1, D))
    b_enc = weights.b_enc.zero_().clone()
    with Allocations(CachingAllocator()) as seen:
        fold_norm_gain(weights, F, norm)
    assert [size for size in seen.sizes if size > MIB] == [2 * CHUNK]
    expected = (before.float() / norm.weight).bfloat16()
    assert torch.equal(weights.W_enc, expected)
    added = b_enc.double() - expected.double() @ norm.bias.double()
    torch.testing.assert_close(weights.b_enc.double(), added, rtol=1e-5, atol=1e-4)
