# SPDX-License-Identifier: Apache-2.0
"""The places that hold modules: slots and the tables of their rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from vllm.config.steering import SiteInfo, Tier
from vllm.model_executor.layers.steering import SiteKey, SteeringBackend
from vllm.model_executor.layers.steering_read_state import ReadBuffers
from vllm.model_executor.layers.steering_state import (
    SAESlot,
    SAEWeights,
    StepState,
    VectorSlot,
)
from vllm.v1.worker.steering_tables import BoundTable

# What a slot holds, by name, on the host.
Content = dict[str, torch.Tensor]


@dataclass
class Place(ABC):
    """A slot for one site of a module, and the tables of its tiers.

    Attributes:
        key: the slot's site.
        tables: by tier.
        offset: the place of the slot's first direction in its tables.
    """

    key: SiteKey
    tables: dict[Tier, BoundTable]
    offset: int

    @property
    @abstractmethod
    def saturated(self) -> torch.Tensor:
        """int64 `[1]`, the saturated tokens of what the slot holds."""

    @abstractmethod
    def fill(self, content: SAEWeights | torch.Tensor) -> None:
        """Copy an SAE or a vector into the slot, in place."""

    @abstractmethod
    def content(self) -> Content:
        """A host copy of what the slot holds."""

    @abstractmethod
    def restore(self, content: Mapping[str, torch.Tensor]) -> None:
        """Undo `fill`, from what `content` returned before."""

    @abstractmethod
    def clear(self) -> None:
        """Make the slot silent."""

    @property
    @abstractmethod
    def reads(self) -> ReadBuffers | None:
        """What reads the slot's features, or None."""

    @property
    @abstractmethod
    def scale(self) -> np.ndarray | None:
        """`BoundTable.unit_scale` of the slot's own tables."""

    @abstractmethod
    def set_scale(self, scale: np.ndarray | None) -> None:
        """Write rows, and read features, in these units."""

    @abstractmethod
    def set_meta(self, site: SiteInfo, mask: int, limit: float | None) -> None:
        """`SAEWeights.set_meta` of what the slot holds."""

    @abstractmethod
    def forget_rows(self) -> None:
        """Empty the slot's own tables; no running request may use them."""


@dataclass
class SAEPlace(Place):
    """A slot for an SAE, with tables of its own."""

    slot: SAESlot

    @property
    def saturated(self) -> torch.Tensor:
        return self.slot.saturated

    def fill(self, content: SAEWeights | torch.Tensor) -> None:
        assert isinstance(content, SAEWeights)
        self.slot.weights.copy_from(content)
        self.slot.weights.refresh()

    def content(self) -> Content:
        return {name: own.cpu().clone() for name, own in self._buffers()}

    def restore(self, content: Mapping[str, torch.Tensor]) -> None:
        for name, own in self._buffers():
            own.copy_(content[name])
        self.slot.weights.refresh()

    def clear(self) -> None:
        self.slot.weights.clear()

    @property
    def reads(self) -> ReadBuffers | None:
        return self.slot.reads

    @property
    def scale(self) -> np.ndarray | None:
        return self.tables[Tier.FULL].unit_scale

    def set_scale(self, scale: np.ndarray | None) -> None:
        for table in self.tables.values():
            table.unit_scale = scale
        if self.reads is not None:
            self.reads.set_scale(scale)

    def set_meta(self, site: SiteInfo, mask: int, limit: float | None) -> None:
        self.slot.weights.set_meta(site, mask, limit)

    def forget_rows(self) -> None:
        for table in self.tables.values():
            table.reset()
        if self.reads is not None:
            self.reads.packed.zero_()

    def _buffers(self) -> list[tuple[str, torch.Tensor]]:
        return list(self.slot.weights.named_buffers(recurse=False))


@dataclass
class VectorPlace(Place):
    """One slot for a vector: the row `offset` in the stack of vectors of its site,
    which share a table."""

    slot: VectorSlot

    @property
    def saturated(self) -> torch.Tensor:
        return self.slot.saturated[self.offset : self.offset + 1]

    def fill(self, content: SAEWeights | torch.Tensor) -> None:
        assert isinstance(content, torch.Tensor)
        self._direction.copy_(content)

    def content(self) -> Content:
        return {"direction": self._direction.cpu().clone()}

    def restore(self, content: Mapping[str, torch.Tensor]) -> None:
        self._direction.copy_(content["direction"])

    def clear(self) -> None:
        self._direction.zero_()

    # A vector is not read, has no units and no scalars, and its rows are the stack's.

    @property
    def reads(self) -> None:
        return None

    @property
    def scale(self) -> None:
        return None

    def set_scale(self, scale: np.ndarray | None) -> None:
        assert scale is None

    def set_meta(self, site: SiteInfo, mask: int, limit: float | None) -> None:
        pass

    def forget_rows(self) -> None:
        pass

    @property
    def _direction(self) -> torch.Tensor:
        return self.slot.directions[self.offset]


def make_backend(
    step: StepState, places: dict[int, Place], dtype: torch.dtype
) -> SteeringBackend:
    """The backend that computes the tiers on the step's device."""
    if step.index.device.type == "cpu":
        from vllm.model_executor.layers.steering_reference_backend import (
            ReferenceBackend,
        )

        return ReferenceBackend(step)
    from vllm.model_executor.layers.steering_kernel_backend import KernelBackend

    saes = [p.slot for p in places.values() if isinstance(p, SAEPlace)]
    stacks = {id(p.slot): p.slot for p in places.values() if isinstance(p, VectorPlace)}
    return KernelBackend(step, saes, list(stacks.values()), dtype)
