# SPDX-License-Identifier: Apache-2.0
"""vLLM's connectors that offload KV, on a CPU: all of theirs but what moves bytes.

Stock copies blocks with CUDA streams and refuses a CPU. Here a copy is an assignment.
Which blocks are stored, found and loaded, and under which keys, is stock's.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    GPULoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec
from vllm.v1.kv_offload.factory import OffloadingSpecFactory
from vllm.v1.simple_kv_offload import worker as simple_worker

SPEC = "HostOffloadingSpec"


class HostWorker(OffloadingWorker):
    """Copies blocks when it is asked to."""

    def __init__(self, caches: CanonicalKVCaches, blocks: int):
        self.on_device = [one.tensor for one in caches.tensors]
        self.stored = [one.new_zeros(blocks, one.shape[1]) for one in self.on_device]
        self.finished: list[TransferResult] = []

    def submit_store(
        self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: Any
    ) -> bool:
        for device, stored in zip(self.on_device, self.stored, strict=True):
            stored[dst_spec.block_ids] = device[src_spec.block_ids]
        return self._finish(job_id)

    def submit_load(
        self, job_id: int, src_spec: Any, dst_spec: GPULoadStoreSpec
    ) -> bool:
        for device, stored in zip(self.on_device, self.stored, strict=True):
            device[dst_spec.block_ids] = stored[src_spec.block_ids]
        return self._finish(job_id)

    def _finish(self, job_id: int) -> bool:
        self.finished.append(TransferResult(job_id, success=True))
        return True

    def get_finished(self) -> list[TransferResult]:
        found, self.finished = self.finished, []
        return found

    def wait(self, job_ids: set[int]) -> None:
        """Every copy is finished."""


class HostOffloadingSpec(CPUOffloadingSpec):
    """Stock's spec and manager with a worker that needs no GPU."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        assert self.blocks_per_chunk == 1
        return HostWorker(kv_caches, self.num_chunks)


class _Done:
    """An event that has happened."""

    def record(self, stream: Any = None) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None: ...


class _Stream:
    def __init__(self, priority: int = 0): ...

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, 0


class HostCopies:
    """`DmaCopyBackend` without a device."""

    def init(
        self,
        gpu_caches: dict[str, torch.Tensor],
        cpu_caches: dict[str, torch.Tensor],
        device: torch.device,
        load_stream: Any,
        store_stream: Any,
    ) -> None:
        self.pairs = [(gpu_caches[name], cpu_caches[name]) for name in gpu_caches]

    def launch_copy(
        self,
        src_blocks: list[int],
        dst_blocks: list[int],
        is_store: bool,
        event_idx: int,
        events_list: list[tuple[int, Any]],
        wait_event: Any = None,
    ) -> None:
        for gpu, cpu in self.pairs:
            src, dst = (gpu, cpu) if is_store else (cpu, gpu)
            dst[dst_blocks] = src[src_blocks]
        events_list.append((event_idx, _Done()))

    def shutdown(self) -> None: ...


def without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let both connectors run on a CPU."""
    if SPEC not in OffloadingSpecFactory._registry:
        OffloadingSpecFactory.register_spec(SPEC, __name__, SPEC)
    cuda = SimpleNamespace(Stream=_Stream, current_stream=_Stream)
    names = {**vars(torch), "cuda": cuda, "Event": _Done}
    monkeypatch.setattr(simple_worker, "torch", SimpleNamespace(**names))
    monkeypatch.setattr(simple_worker, "DmaCopyBackend", HostCopies)
