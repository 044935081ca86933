# SPDX-License-Identifier: Apache-2.0
"""What is said when a worker has no memory for its slots."""

from __future__ import annotations

from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from vllm.config.steering import SlotInfo, SteeringConfig
from vllm.config.steering_points import PointWidths, site_name
from vllm.config.steering_sharding import Ranks
from vllm.config.steering_slots import slots_of
from vllm.v1.worker.steering_shape import SteeringShape

GIB = 1 << 30


@contextmanager
def naming_memory(
    config: SteeringConfig, layers: Container[int], shape: SteeringShape
) -> Iterator[None]:
    """Say what the slots of this rank's layers need if there is no memory for them.

    Raises:
        ValueError: instead of PyTorch's error.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        ranks = replace(config.ranks, item_bytes=shape.dtype.itemsize)
        own = [
            slot
            for slot in slots_of(config).values()
            if slot.layer in layers and slot.kind == "sae"
        ]
        free = free_bytes(shape.device)
        raise ValueError(too_large(own, ranks, shape.widths, free)) from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out; on a CPU PyTorch raises a plain RuntimeError."""
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or "can't allocate memory" in str(error)


def free_bytes(device: torch.device) -> int | None:
    """What a GPU has left; None for other devices."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def too_large(
    slots: list[SlotInfo], ranks: Ranks, widths: PointWidths, free: int | None
) -> str:
    """What these slots need on this rank, and what would make them need less."""
    needed = {at: slot_bytes(slot, ranks, widths) for at, slot in enumerate(slots)}
    left = "memory ran out" if free is None else f"{free / GIB:.2f} GiB are free"
    text = (
        f"steering: the SAEs of this rank need {sum(needed.values()) / GIB:.2f} GiB, "
        f"and {left}"
    )
    if not slots:
        return text
    at = max(needed, key=lambda at: needed[at])
    slot, size = slots[at], needed[at]
    d_in, d_out = widths.of(slot.hook), widths.of(slot.out_hook)
    where = site_name(slot.hook, slot.layer)
    text += (
        f"; the largest, at {where}, has {slot.width} features x {d_in} and needs "
        f"{size / GIB:.2f} GiB; expected fewer or narrower SAEs"
    )
    if slot.sharded:
        return f"{text}, or more tensor-parallel ranks than {ranks.size}"
    if ranks.size == 1:
        return f"{text}, or tensor-parallel ranks that share them"
    if not ranks.can_shard(slot.width, d_out):
        return text
    shard = slot_bytes(replace(slot, sharded=True), ranks, widths)
    return (
        f'{text}, or "sharding": "shard", with which each of {ranks.size} ranks needs '
        f"{shard / GIB:.2f} GiB of it"
    )


def slot_bytes(slot: SlotInfo, ranks: Ranks, widths: PointWidths) -> int:
    """Bytes of the weights of an SAE's slot on this rank."""
    d_in, d_out = widths.of(slot.hook), widths.of(slot.out_hook)
    sizes = (slot.width, d_in, d_out)
    if slot.sharded:
        return ranks.shard_bytes(*sizes, has_skip=slot.has_skip)
    return ranks.whole_bytes(*sizes, has_skip=slot.has_skip)
