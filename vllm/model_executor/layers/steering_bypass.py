# SPDX-License-Identifier: Apache-2.0
"""Counts the tokens that modules leave alone because of their ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from vllm.model_executor.layers.steering_clamp_table import ClampTable


@dataclass(frozen=True)
class Bypass:
    """One module that has a skip set.

    Attributes:
        name: of the module.
        mask: the bit of its skip set in `StepState.flags`.
        tables: of each of its slots on this rank, those of the delta and full tiers.
    """

    name: str
    mask: int
    tables: Sequence[tuple[ClampTable, ClampTable]]


class BypassCounts(nn.Module):
    """Counters of the modules that have a skip set, one for each module.

    A token is counted once for each module that one of its rows edits somewhere, and
    whose skip set contains its id. `write_flags` of a backend counts.

    The launch that counts is outside of captured graphs, so `watch` may replace the
    tensors. They are buffers, so that sleeping and waking the model restores them.

    Attributes:
        modules: what is counted, in the order of `counts`.
        counts: int64 `[M]`, tokens since `watch`.
        tables: int64 `[2 S]`, addresses of the clamp tables of all slots: of the delta
            tier, then of the full tier. The tables of an engine have equal shapes.
        starts: int32 `[M + 1]`, the first slot of each module, and their number S.
        masks: int32 `[M]`.
    """

    counts: torch.Tensor
    tables: torch.Tensor
    starts: torch.Tensor
    masks: torch.Tensor

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device
        for name in ("counts", "tables", "starts", "masks"):
            self.register_buffer(name, torch.zeros(1, device=device), persistent=False)
        self.watch(())

    def watch(self, modules: Sequence[Bypass]) -> None:
        """Count for these modules from now on, from zero."""
        self.modules = tuple(modules)
        tables, starts = [0], [0]
        for module in self.modules:
            starts.append(starts[-1] + len(module.tables))
            for pair in module.tables:
                tables += [table.packed.data_ptr() for table in pair]
        masks = [0, *(module.mask for module in self.modules)]
        self.tables = self._upload(tables[1:] or tables, torch.int64)
        self.starts = self._upload(starts, torch.int32)
        self.masks = self._upload(masks[1:] or masks, torch.int32)
        self.counts = self._upload([0] * len(masks[1:] or masks), torch.int64)

    def _upload(self, numbers: list[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(numbers, dtype=dtype, device=self.device)

    @property
    def stride(self) -> int:
        """Numbers from one row of a table to the next."""
        pairs = (pair for module in self.modules for pair in module.tables)
        first = next(pairs, None)
        return 0 if first is None else first[0].packed.stride(0)

    def count(
        self, flags: torch.Tensor, delta: torch.Tensor, full: torch.Tensor
    ) -> None:
        """What the GPU's kernel does, in plain PyTorch.

        Args:
            flags: int32 `[n]`, as of `StepState`.
            delta, full: int32 `[n]`, the tokens' rows of both tiers.
        """
        for at, module in enumerate(self.modules):
            skipped = ((flags & module.mask) != 0).nonzero().squeeze(1)
            if not skipped.numel():
                continue
            edited = torch.zeros_like(skipped, dtype=torch.bool)
            for pair in module.tables:
                for table, rows in zip(pair, (delta, full), strict=True):
                    edited |= table.active[rows[skipped].long()] != 0
            self.counts[at] += edited.sum()
