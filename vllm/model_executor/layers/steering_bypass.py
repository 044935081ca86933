# SPDX-License-Identifier: Apache-2.0
"""Counts the tokens that modules leave alone because of their ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from vllm.model_executor.layers.steering_state import SAESlot


@dataclass(frozen=True)
class Bypass:
    """One module that has a skip set.

    Attributes:
        name: of the module.
        mask: the bit of its skip set in `StepState.flags`.
        slots: its slots on this rank.
    """

    name: str
    mask: int
    slots: Sequence[SAESlot]


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
            starts.append(starts[-1] + len(module.slots))
            for slot in module.slots:
                tables += [slot.delta.packed.data_ptr(), slot.full.packed.data_ptr()]
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
        slots = (slot for module in self.modules for slot in module.slots)
        first = next(slots, None)
        return 0 if first is None else first.delta.packed.stride(0)

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
            for slot in module.slots:
                edited |= slot.delta.active[delta[skipped].long()] != 0
                edited |= slot.full.active[full[skipped].long()] != 0
            self.counts[at] += edited.sum()
