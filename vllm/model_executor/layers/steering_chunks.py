# SPDX-License-Identifier: Apache-2.0
"""Folds large matrices a chunk of rows at a time, through memory that is used again.

While vLLM loads a model, it limits PyTorch's caching allocator to
`max_split_size_mb:20`. A request of 1 to 10 MiB then takes a part of a segment of
20 MiB. Once all parts of that segment are free, they are one block of 20 MiB, which
the allocator gives to no request below 20 MiB. So chunks of a few MiB that come and
go would take segment after segment. A block of at least 20 MiB is given again to the
next request of about its size. So a fold asks once, and for that much.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from vllm.utils.math_utils import round_up

if TYPE_CHECKING:
    Array = TypeVar("Array", np.ndarray, torch.Tensor)

# Of one chunk in float32.
CHUNK_BYTES = 8 << 20
# From this size on, the allocator's blocks are used again under vLLM's limit.
REUSED_BYTES = 20 << 20
# A multiple of every dtype's size, and what the allocator aligns to.
_ALIGNMENT = 512


def chunk_rows(width: int) -> int:
    """Rows of a chunk of a matrix with this many columns."""
    return max(1, CHUNK_BYTES // (4 * width))


class ChunkMemory:
    """Room for one chunk as it is stored, and for two chunks in float32.

    What a method returns is valid until the same method is called again.

    Args:
        elements: of the largest chunk.
        device: where the chunks are folded.
        stored_bytes: of the largest chunk as its file has it, if it is copied to the
            device in that dtype.
    """

    def __init__(self, elements: int, device: torch.device, stored_bytes: int = 0):
        sizes = [4 * elements, 4 * elements, stored_bytes]
        sizes = [round_up(size, _ALIGNMENT) for size in sizes]
        least = 0 if device.type == "cpu" else REUSED_BYTES
        size = max(sum(sizes), least)
        memory = torch.empty(size, dtype=torch.uint8, device=device)
        self._work, self._spare, self._stored = memory[: sum(sizes)].split(sizes)

    def from_host(self, part: torch.Tensor) -> torch.Tensor:
        """A tensor of the host on the device, in its own dtype; without room for it,
        the tensor itself."""
        if not self._stored.numel():
            return part
        return _shaped(self._stored, part.shape, part.dtype).copy_(part)

    def work(self, value: torch.Tensor) -> torch.Tensor:
        """A float32 copy of a chunk."""
        return _shaped(self._work, value.shape, torch.float32).copy_(value)

    def spare(self, shape: Sequence[int]) -> torch.Tensor:
        """An uninitialised float32 chunk."""
        return _shaped(self._spare, shape, torch.float32)

    def rounded(self, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A float32 chunk in a dtype, in the memory of `spare`; float32 as it is."""
        if dtype is torch.float32:
            return value
        return _shaped(self._spare, value.shape, dtype).copy_(value)


def _shaped(
    memory: torch.Tensor, shape: Sequence[int], dtype: torch.dtype
) -> torch.Tensor:
    """The beginning of some memory as a tensor."""
    size = torch.Size(shape).numel() * dtype.itemsize
    return memory[:size].view(dtype).view(shape)


def row_sums(W: Array) -> Array:
    """The sums of the rows of `W [n, D]`, as `[n]`; `W` is overwritten.

    Halves are added to each other. This order is fixed, so NumPy and PyTorch on every
    device get the same bits.
    """
    width = W.shape[1]
    while width > 1:
        half = (width + 1) // 2
        W[:, : width - half] += W[:, half:width]
        width = half
    return W[:, 0]
