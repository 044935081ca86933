# SPDX-License-Identifier: Apache-2.0
"""Ranks that share an SAE, without an engine: processes that talk through Gloo."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from vllm.model_executor.layers.steering_read_state import ReadBuffers
from vllm.model_executor.layers.steering_shards import Shard
from vllm.model_executor.layers.steering_state import SAESlot, SAEWeights


def gloo_shard() -> Shard:
    """This process's part in the default group."""
    size = dist.get_world_size()

    def stack(own: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(own) for _ in range(size)]
        dist.all_gather(parts, own.contiguous())
        return torch.stack(parts)

    return Shard(dist.get_rank(), size, stack)


def _main(
    rank: int, size: int, file: str, path: list[str], work: Callable[[Shard], None]
) -> None:
    sys.path[:] = path
    # The order of a sum may depend on the number of threads.
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{file}", rank=rank, world_size=size)
    try:
        work(gloo_shard())
    finally:
        dist.destroy_process_group()


def on_ranks(size: int, directory: Path, work: Callable[[Shard], None]) -> None:
    """Run `work` on every rank of a new group; raise what one of them raises."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    file = str(directory / "rendezvous")
    mp.spawn(_main, (size, file, sys.path, work), nprocs=size)


def shard_of(whole: SAEWeights, shard: Shard) -> SAEWeights:
    """What a rank holds of an SAE."""
    device, dtype = whole.W_enc.device, whole.W_enc.dtype
    skip = whole.W_skip is not None
    part = SAEWeights(
        whole.d_sae_capacity, whole.d_in, dtype, device, whole.d_out, skip, shard
    )
    part.W_enc.copy_(whole.W_enc[part.own])
    part.b_enc.copy_(whole.b_enc[part.own])
    part.threshold.copy_(whole.threshold[part.own])
    part.W_dec.copy_(whole.W_dec[:, part.columns])
    part.b_dec.copy_(whole.b_dec[part.columns])
    if part.W_skip is not None and whole.W_skip is not None:
        part.W_skip.copy_(whole.W_skip[part.columns])
    if part.row_norms is not None:
        part.row_norms.copy_(whole.W_dec.float().norm(dim=1))
    part.meta.copy_(whole.meta)
    part.norm_limit.copy_(whole.norm_limit)
    return part


def shared_slot(slot: SAESlot, shard: Shard) -> SAESlot:
    """A slot of a rank, with the rows of a slot that holds everything."""
    rows, clamps = slot.full.num_rows, slot.full.max_clamps
    own = SAESlot(
        shard_of(slot.weights, shard), rows, clamps, slot.activations, slot.reads_source
    )
    own.full.packed.copy_(slot.full.packed)
    own.delta.packed.copy_(slot.delta.packed)
    if slot.reads is not None:
        reads = slot.reads
        device = reads.packed.device
        shape = (len(reads.out), reads.scale.shape[0])
        own.reads = ReadBuffers(
            len(reads.packed), reads.max_clamps, *shape, device, reads.max_read
        )
        own.reads.packed.copy_(reads.packed)
        own.reads.scale.copy_(reads.scale)
    return own
