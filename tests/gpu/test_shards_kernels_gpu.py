# SPDX-License-Identifier: Apache-2.0
"""GPUs that share an SAE through their memory write the bits of one, eagerly and in
captured graphs, whoever is late."""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

pytestmark = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="needs two CUDA devices"
)


def _allocate(rank: int) -> Callable[[int], list[int]]:
    from vllm.distributed.device_communicators.custom_all_reduce import (
        CustomAllreduce,
    )
    from vllm.model_executor.layers.steering_shards import tensor_at

    group = dist.new_group(backend="gloo")

    def allocate(nbytes: int) -> list[int]:
        found = CustomAllreduce.create_shared_buffer(nbytes, group=group)
        tensor_at(found[rank], nbytes, torch.device("cuda", rank)).zero_()
        torch.cuda.synchronize()
        dist.barrier(group)
        return found

    return allocate


def _main(rank: int, size: int, file: str) -> None:
    os.environ["NCCL_NVLS_ENABLE"] = "0"
    torch.cuda.set_device(rank)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl", f"file://{file}", rank=rank, world_size=size
    )
    from steering_testing.shards import shared_slot
    from test_shared_cuda_gpu import JUMP, TOPK, Case
    from test_shared_gpu import make_case, steered

    from vllm.model_executor.layers import sae_full_reconstruction_kernel as kernel
    from vllm.model_executor.layers.steering_shards import Shard
    from vllm.model_executor.layers.steering_state import StepState

    def stack(own: torch.Tensor) -> torch.Tensor:
        every = own.new_empty(size, *own.shape)
        dist.all_gather_into_tensor(every, own.contiguous())
        return every

    shard = Shard(rank, size, stack, _allocate(rank))
    cases = [
        Case(tokens, 16384, 2304, activation, l0, size)
        for tokens, l0 in ((1, 64), (64, 64), (64, 700), (300, 1000), (2048, 64))
        for activation in (JUMP, TOPK)
    ]
    cases += [
        Case(1, 131072, 5376, JUMP, 100, size),
        Case(64, 131072, 5376, JUMP, 100, size),
        Case(64, 65536, 8192, TOPK, 64, size),
    ]
    random.seed(rank)
    for case in cases:
        torch.manual_seed(case.tokens + case.l0)
        slot, step = make_case(case)
        hidden = torch.randn(case.tokens, case.d_model, device="cuda").bfloat16()
        residual = torch.randn_like(hidden)
        expected = steered(slot, step, [hidden, residual])
        own = shared_slot(slot, shard)
        for _ in range(3):
            time.sleep(0.003 * random.random())
            found = steered(own, step, [hidden, residual])
            own.saturated.zero_()
            for at, (x, y) in enumerate(zip(found, expected, strict=True)):
                assert torch.equal(x, y), f"{case}: rank {rank}: result {at} differs"
        slot.saturated.zero_()
        _replay(kernel, StepState, slot, own, step, [hidden, residual], case)
        if rank == 0:
            print("exact:", case, flush=True)
    dist.barrier()
    torch.cuda.synchronize()
    sys.stdout.flush()
    os._exit(0)  # peers' memory goes with the process


def _replay(kernel, step_type, slot, own, step, stream, case) -> None:  # type: ignore
    """One captured step, replayed with other tokens each time, some with none."""
    from vllm.config.steering import Tier

    rows = step.index[Tier.FULL].clone()
    workspaces = [
        kernel.SteeringWorkspace(step.max_tokens, [s], torch.device("cuda"))
        for s in (slot, own)
    ]
    buffers = [[x.clone() for x in stream] for _ in range(2)]

    def run(at: int) -> None:
        chosen = (slot, own)[at]
        kernel.full_reconstruction(chosen, step, workspaces[at], *buffers[at])

    run(0), run(1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(1)
    generator = torch.Generator().manual_seed(1)  # the same on every rank
    for _ in range(30):
        share = torch.rand((), generator=generator).item() - 0.2
        keep = torch.rand(rows.shape, generator=generator) < share
        step.index[Tier.FULL] = torch.where(keep.to(rows.device), rows, 0)
        for own_buffers in buffers:
            for x, y in zip(own_buffers, stream, strict=True):
                x.copy_(y)
        time.sleep(0.002 * random.random())
        graph.replay()
        run(0)
        for x, y in zip(*buffers, strict=True):
            assert torch.equal(x, y), f"{case}: replay differs"
    step.index[Tier.FULL] = rows


@pytest.mark.parametrize("ranks", [2, 4])
def test_gpus_write_the_bits_of_one(ranks: int, tmp_path: Path) -> None:
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} CUDA devices")
    mp.spawn(_main, (ranks, str(tmp_path / "rendezvous")), nprocs=ranks)
