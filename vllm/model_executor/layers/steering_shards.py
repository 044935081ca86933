# SPDX-License-Identifier: Apache-2.0
"""What one rank of a tensor-parallel group holds of a sharded SAE.

Rank r of `size` holds features `r F/size ..` of the encoder, and columns
`r D/size ..` of the decoder for all features (docs/design/sharding.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


def _alone(own: torch.Tensor) -> torch.Tensor:
    return own[None]


@dataclass(frozen=True)
class Shard:
    """One rank's part of what a group of ranks shares; by default, all of it.

    Attributes:
        rank, size: which of how many parts.
        stack: `[n, w]` of each rank -> `[size, n, w]` on every rank. All ranks call it
            together, with the same shapes.
    """

    rank: int = 0
    size: int = 1
    stack: Callable[[torch.Tensor], torch.Tensor] = _alone

    def gather(self, own: torch.Tensor) -> torch.Tensor:
        """`[n, w]` of each rank -> `[n, size * w]`, in the ranks' order."""
        if self.is_whole:
            return own
        return self.stack(own).transpose(0, 1).reshape(own.shape[0], -1)

    @property
    def is_whole(self) -> bool:
        """Whether this rank holds everything."""
        return self.size == 1

    def part(self, whole: int) -> slice:
        """This rank's range of `whole` features or columns.

        Raises:
            ValueError: they cannot be divided equally.
        """
        if whole % self.size:
            raise ValueError(
                f"steering: found {whole} features or columns for {self.size} ranks, "
                f"expected a multiple of {self.size}"
            )
        width = whole // self.size
        return slice(self.rank * width, (self.rank + 1) * width)


WHOLE = Shard()


def tensor_parallel_shard() -> Shard:
    """This rank's part among those of its tensor-parallel group."""
    # Deferred: commands that only read files do without the rest of vLLM.
    from vllm.distributed import get_tp_group

    group = get_tp_group()

    def stack(own: torch.Tensor) -> torch.Tensor:
        every = group.all_gather(own.contiguous(), dim=0)
        return every.view(group.world_size, *own.shape)

    return Shard(group.rank_in_group, group.world_size, stack)
