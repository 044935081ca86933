# SPDX-License-Identifier: Apache-2.0
"""What one rank of a tensor-parallel group holds of a sharded SAE.

Rank r of `size` holds features `r F/size ..` of the encoder, and columns
`r D/size ..` of the decoder for all features (docs/design/sharding.md).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from vllm.config.steering_environment import PEER_MEMORY_ENV, stores_unasked
from vllm.config.steering_json import Json


def peer_memory_is_on(ranks: int) -> bool:
    """Whether so many ranks may exchange through each other's memory.

    Two do unless it is turned off, and more do if it is asked for.
    """
    asked = os.environ.get(PEER_MEMORY_ENV)
    return stores_unasked(ranks) if asked is None else asked == "1"


class _Memory:
    """Memory that PyTorch has not allocated, as it asks for it."""

    def __init__(self, address: int, nbytes: int):
        self.__cuda_array_interface__: Json = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


def tensor_at(address: int, nbytes: int, device: torch.device) -> torch.Tensor:
    """uint8 `[nbytes]`: memory of a GPU, which must outlive the tensor."""
    return torch.as_tensor(_Memory(address, nbytes), device=device)


def _alone(own: torch.Tensor) -> torch.Tensor:
    return own[None]


@dataclass(frozen=True)
class Shard:
    """One rank's part of what a group of ranks shares; by default, all of it.

    Attributes:
        rank, size: which of how many parts.
        stack: `[n, w]` of each rank -> `[size, n, w]` on every rank. All ranks call it
            together, with the same shapes.
        allocate: bytes -> the addresses of new memory of so many bytes on each rank,
            in rank order, all zero. All ranks call it together. None: a rank cannot
            address the memory of others.
        gathers: why `allocate` is None, for the log.
        turn: called where a rank begins to wait for what others have sent, if ranks
            take turns on one device; None: they run at the same time.
    """

    rank: int = 0
    size: int = 1
    stack: Callable[[torch.Tensor], torch.Tensor] = _alone
    allocate: Callable[[int], list[int]] | None = None
    turn: Callable[[], None] | None = None
    gathers: str = "ranks do not address each other's memory"

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

    own = Shard(group.rank_in_group, group.world_size, stack)
    allocate = peer_allocator()
    if isinstance(allocate, str):
        return replace(own, gathers=allocate)
    return replace(own, allocate=allocate)


class PeerMemory:
    """Memory that all ranks address, which late slots use again.

    Args:
        create: bytes -> addresses, all zero; all ranks call it together.
        clear: sets this rank's part to zero. No rank may exchange meanwhile.
    """

    def __init__(
        self,
        create: Callable[[int], list[int]],
        clear: Callable[[list[int], int], None],
    ):
        self._create, self._clear = create, clear
        self._nbytes = 0
        self._addresses: list[int] = []

    def __call__(self, nbytes: int) -> list[int]:
        """As `Shard.allocate`; what was given out before is no longer used."""
        if nbytes > self._nbytes:
            self._addresses, self._nbytes = self._create(nbytes), nbytes
        else:
            self._clear(self._addresses, nbytes)
        return self._addresses


def no_arena(nbytes: int, device: torch.device, error: RuntimeError) -> str:
    """Why a rank has no memory that others can address, and what would help."""
    mib = 1 << 20
    free, total = torch.cuda.mem_get_info(device)
    kept = torch.cuda.memory_reserved(device)
    cause = str(error).partition("\n")[0]
    return (
        f"steering: found {free // mib} of {total // mib} MiB free ({kept // mib} are "
        f"this process's) for {nbytes // mib} MiB through which ranks exchange: "
        f"{cause}; expected more free memory, or {PEER_MEMORY_ENV}=0"
    )


def peer_allocator() -> Callable[[int], list[int]] | str:
    """How the ranks of the tensor-parallel group get memory that all can address; or
    why they do not.

    Two and four need not ask, others take `VLLM_STEERING_PEER_MEMORY=1`. vLLM's custom
    all-reduce must be on: it needs the same of the GPUs, one host and access to each
    other's memory, and has checked it.
    """
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "the devices are not NVIDIA's"
    from vllm.distributed import get_tp_group
    from vllm.distributed.device_communicators.cuda_communicator import (
        CudaCommunicator,
    )
    from vllm.distributed.device_communicators.custom_all_reduce import (
        CustomAllreduce,
    )

    group = get_tp_group()
    if not peer_memory_is_on(group.world_size):
        return f"{group.world_size} ranks do not, since {PEER_MEMORY_ENV} is not 1"
    own, device = group.rank_in_group, group.device
    communicator = group.device_communicator
    if not isinstance(communicator, CudaCommunicator):
        return "vLLM's communicator is not for CUDA"
    reduces = communicator.ca_comm
    if reduces is None or reduces.disabled:
        return "vLLM's custom all-reduce is off"
    if reduces.mnnvl_only:
        return "the ranks are on several hosts"

    def create(nbytes: int) -> list[int]:
        # What PyTorch has kept for itself is of no use to others.
        torch.cuda.empty_cache()
        try:
            addresses = CustomAllreduce.create_shared_buffer(
                nbytes, group=group.cpu_group
            )
        except RuntimeError as error:
            raise ValueError(no_arena(nbytes, device, error)) from None
        clear(addresses, nbytes)
        group.barrier()
        return addresses

    def clear(addresses: list[int], nbytes: int) -> None:
        tensor_at(addresses[own], nbytes, device).zero_()
        torch.cuda.synchronize(device)

    return PeerMemory(create, clear)
