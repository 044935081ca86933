# SPDX-License-Identifier: Apache-2.0
"""The memory through which GPUs that share SAEs exchange: sizes, and what C++ says."""

from __future__ import annotations

import itertools
import re
from dataclasses import fields as fields_of
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vllm.config.steering import Activation
from vllm.config.steering_environment import PEER_MEMORY_ENV
from vllm.config.steering_sharding import exchange_bytes
from vllm.model_executor.layers import steering_shards
from vllm.model_executor.layers.steering_kernels import (
    peers,
    stages_shared_cuda,
    workspace,
)
from vllm.model_executor.layers.steering_kernels.extension import Kernels
from vllm.model_executor.layers.steering_kernels.plan import (
    CHUNK_ALIGN,
    LIST_MAX,
    plan_chunks,
)
from vllm.model_executor.layers.steering_shards import Shard
from vllm.model_executor.layers.steering_state import SAESlot, SAEWeights

CSRC = Path(__file__).parents[3] / "csrc" / "steering"


def stated(name: str) -> str:
    return (CSRC / name).read_text()


def enum_of(text: str, name: str) -> dict[str, int]:
    """Members of an enum, with the values that C++ gives them."""
    body = re.search(rf"enum {name} \{{(.*?)\}}", text, re.DOTALL)
    assert body is not None
    members = re.findall(r"(k\w+)(?: = (\d+))?", re.sub("//.*", "", body[1]))
    values: dict[str, int] = {}
    for member, value in members:
        values[member] = int(value) if value else len(values)
    return values


def test_the_regions_of_an_arena_hold_what_they_are_for_and_do_not_meet() -> None:
    for size, rows, width in itertools.product((2, 4, 8), (1, 64, 2048), (64, 5376)):
        at = peers.plan_arena(size, rows, width, max_clamps=64)
        slices = -(-(width // size) // peers.COLUMN_SLICE)
        assert at.lists == peers.HEADER_BYTES
        assert at.flags >= at.lists + 8 * size * rows * (1 + LIST_MAX)
        assert at.columns >= at.flags + 4 * rows * size * slices
        clamps = at.clamps
        assert clamps.rounds >= at.columns + 2 * rows * width
        assert clamps.heads >= clamps.rounds + 4 * clamps.rows
        assert clamps.acts >= clamps.heads + 8 * clamps.rows * size
        assert clamps.flags >= clamps.acts + 8 * clamps.rows * clamps.each
        assert at.packets >= clamps.flags + 4 * clamps.rows * size * slices
        lists = 16 * size * at.packet_rows * (1 + LIST_MAX)
        assert at.column_packets >= at.packets + lists
        assert at.staging >= at.column_packets + 4 * at.packet_rows * width
        assert at.nbytes == at.staging + peers.STAGING_BYTES
        of_clamps = (clamps.rounds, clamps.heads, clamps.acts, clamps.flags)
        for start in (at.lists, at.flags, at.columns, at.staging, *of_clamps):
            assert start % 256 == 0


def test_the_stated_size_of_an_arena_is_its_size() -> None:
    sizes, rows, widths, clamps = (
        (2, 4, 8),
        (1, 64, 300, 2048),
        (64, 5376),
        (1, 64, 4096),
    )
    for size, row, width, most in itertools.product(sizes, rows, widths, clamps):
        at = peers.plan_arena(size, row, width, most)
        stated_size = exchange_bytes(size, width, row, most)
        # Regions begin at multiples of 256 bytes, behind a header.
        assert 0 <= at.nbytes - stated_size <= peers.HEADER_BYTES + 10 * 256


def test_many_clamps_leave_room_for_fewer_tokens_at_a_time() -> None:
    rows = [
        peers.plan_arena(2, 2048, 64, most).clamps.rows for most in (1, 64, 2048, 4096)
    ]
    assert rows == [2048, 2048, 512, 256]


@pytest.mark.parametrize("topk", [False, True])
@pytest.mark.parametrize("tokens", [1, 64, 300, 2048, 2049, 8192])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_no_chunk_is_longer_than_what_ranks_exchange(
    topk: bool, tokens: int, size: int
) -> None:
    for d_sae, d_model in ((16384, 2304), (131072, 5376), (65536, 8192)):
        limits = peers.exchange_limits(d_sae // size)
        widths = (d_model, d_model, d_sae, 64, 2)
        plan = plan_chunks(tokens, *widths, topk, exchanged=limits)
        assert plan.rows <= peers.EXCHANGE_ROWS
        assert plan.rows * plan.num_chunks >= tokens
        staged = plan.rows if topk else plan.dense_rows
        assert 4 * staged * d_sae // size <= peers.STAGING_BYTES
        few = plan.num_chunks == 1 or plan.rows <= CHUNK_ALIGN
        assert few or plan.rows % CHUNK_ALIGN == 0


def test_only_whole_tiles_of_ranks_that_reach_each_other_are_exchanged() -> None:
    def allocate(nbytes: int) -> list[int]:
        return [0] * nbytes

    two = Shard(0, 2, allocate=allocate)
    assert peers.can_exchange(two, 512, 64)
    assert not peers.can_exchange(two, 256, 64)
    assert not peers.can_exchange(two, 512, 24)
    assert not peers.can_exchange(Shard(0, 2), 512, 64)
    assert not peers.can_exchange(Shard(allocate=allocate), 512, 64)
    assert not peers.can_exchange(Shard(0, 16, allocate=allocate), 1 << 20, 8192)


def no_addresses(nbytes: int) -> list[int]:
    raise AssertionError("nothing is allocated here")


def slot_of(
    shard: Shard,
    d_sae: int = 512,
    dtype: torch.dtype = torch.bfloat16,
    skip: bool = False,
) -> SAESlot:
    cpu = torch.device("cpu")
    weights = SAEWeights(d_sae, 64, dtype, cpu, has_skip=skip, shard=shard)
    return SAESlot(weights, 2, 4, frozenset({Activation.RELU}), reads_source=skip)


REACH = Shard(0, 2, allocate=no_addresses)


@pytest.mark.parametrize(
    ("slot", "why"),
    [
        (slot_of(REACH), ""),
        (slot_of(Shard(0, 2, gathers="they are far away")), "they are far away"),
        (slot_of(REACH, d_sae=768), "768 features x 64 .* multiples of 256 x 8 for 2"),
        (slot_of(REACH, dtype=torch.float32), "not 16-bit"),
        (slot_of(REACH, skip=True), "skip connection"),
        (slot_of(Shard()), "not shared"),
    ],
    ids=["fits", "far", "features", "float32", "skip", "whole"],
)
def test_what_the_kernels_cannot_share_is_gathered_and_said(
    slot: SAESlot, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:

    monkeypatch.setattr(workspace, "kernels_for", lambda device: Kernels.ALL)
    assert re.search(why, workspace.why_gathers(slot))
    assert workspace.exchanges(slot) == (why == "")


def test_other_devices_gather() -> None:
    assert "Hopper" in workspace.why_gathers(slot_of(REACH))


def test_the_first_rank_says_once_how_ranks_exchange(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    monkeypatch.setattr(
        workspace.logger, "info", lambda text, *parts: said.append(text % parts)
    )
    cpu = torch.device("cpu")
    for rank in (0, 1):
        slots = [slot_of(Shard(rank, 2, gathers="they are far away")) for _ in range(3)]
        workspace.SteeringWorkspace(4, [*slots, slot_of(Shard())], cpu)
    (message,) = said
    assert "of 3 shared SAEs" in message
    assert "3 by all_gather (they are far away)" in message


def test_a_rank_without_memory_says_what_it_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 << 20, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 20 << 30)
    said = steering_shards.no_arena(
        90 << 20, torch.device("cuda"), RuntimeError("CUDA error: out of memory\nmore")
    )
    assert "found 3 of 81920 MiB free (20480 are this process's)" in said
    assert "90 MiB" in said and "out of memory; expected" in said and "\n" not in said
    assert f"or {PEER_MEMORY_ENV}=0" in said


def test_late_slots_use_the_memory_that_there_is() -> None:
    created: list[int] = []
    cleared: list[tuple[list[int], int]] = []

    def create(nbytes: int) -> list[int]:
        created.append(nbytes)
        return [len(created), 2 * len(created)]

    memory = steering_shards.PeerMemory(
        create, lambda addresses, nbytes: cleared.append((addresses, nbytes))
    )
    assert memory(100) == [1, 2] and not cleared
    # Its regions may lie elsewhere now, so nothing of before may be left.
    assert memory(100) == [1, 2] == memory(60)
    assert cleared == [([1, 2], 100), ([1, 2], 60)]
    assert memory(101) == [2, 4] and created == [100, 101]


def test_two_and_four_ranks_store_and_more_are_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    is_on = steering_shards.peer_memory_is_on
    monkeypatch.delenv(PEER_MEMORY_ENV, raising=False)
    assert is_on(2) and is_on(4) and not is_on(6) and not is_on(8)
    monkeypatch.setenv(PEER_MEMORY_ENV, "1")
    assert is_on(2) and is_on(4) and is_on(8)
    monkeypatch.setenv(PEER_MEMORY_ENV, "0")
    assert not is_on(2) and not is_on(4)


def test_ranks_that_are_not_asked_gather_and_say_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    group = SimpleNamespace(world_size=8)
    monkeypatch.setattr("vllm.distributed.get_tp_group", lambda: group)
    monkeypatch.delenv(PEER_MEMORY_ENV, raising=False)
    said = f"8 ranks do not, since {PEER_MEMORY_ENV} is not 1"
    assert steering_shards.peer_allocator() == said


def test_python_and_cpp_state_the_same() -> None:
    exchange, kernels = stated("exchange.cuh"), stated("shared_kernels.cuh")
    assert f"kMaxRanks = {peers.MAX_RANKS};" in exchange
    assert f"kColumnsOfSlice = {peers.COLUMN_SLICE};" in stated("bundles.cuh")
    parts = {"kAnnounce": peers.ANNOUNCE, "kCopy": peers.COPY, "kAwait": peers.AWAIT}
    assert enum_of(kernels, "PullPart") == parts
    phases = enum_of(stated("dense.cuh"), "DensePhase")
    assert phases["kPulled"] == stages_shared_cuda.PULLED
    assert phases["kPhases"] == stages_shared_cuda.PHASES
    fields = enum_of(stated("constants.cuh"), "ShareField")
    assert list(fields.values()) == list(range(len(fields)))
    names = [name.removeprefix("kShare") for name in fields]
    assert [name.lower() for name in names] == [
        field.replace("_", "") for field in peers.SHARE_FIELDS
    ]
    regions = enum_of(stated("constants.cuh"), "ClampShareField")
    assert list(regions.values()) == list(range(len(peers.CLAMP_FIELDS) + 1))
    assert [name.removeprefix("kClamp").lower() for name in list(regions)[:-1]] == [
        *peers.CLAMP_FIELDS
    ]
    assert [field.name for field in fields_of(peers.ClampRegions)] == [
        *peers.CLAMP_FIELDS
    ]
    assert enum_of(stated("shared_clamp.cuh"), "ClampPart") == {
        "kSendActs": peers.SEND_ACTS,
        "kSendColumns": peers.SEND_COLUMNS,
        "kWriteTokens": peers.WRITE_TOKENS,
    }
    headers = enum_of(exchange, "HeaderField")
    ready, done = headers["kReady"], headers["kDone"]
    assert headers["kLeft"] < ready and ready + peers.MAX_RANKS <= done
    assert 4 * (done + peers.MAX_RANKS) <= peers.HEADER_BYTES
