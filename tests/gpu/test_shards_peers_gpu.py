# SPDX-License-Identifier: Apache-2.0
"""GPUs that share SAEs through their memory, in an engine under CUDA graphs: float16
answers with the bits of copies, and those of Hugging Face in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from steering_testing import matrix, peer_engines
from steering_testing.engine import engine
from steering_testing.gpus import RANK_OPTIONS
from steering_testing.observe import steps_of
from steering_testing.peer_engines import (
    answers,
    check_bits,
    check_late_modules,
    check_oracle,
    check_reading,
    has_screened,
    requests,
    rounds_of,
)
from steering_testing.requests import prompt

from vllm import LLM
from vllm.config import steering_screening
from vllm.config.steering_environment import PEER_MEMORY_ENV
from vllm.engine.steering_topology import can_screen

pytestmark = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="needs two CUDA devices"
)

OPTIONS = {
    **RANK_OPTIONS,
    "dtype": "float16",
    "disable_custom_all_reduce": False,  # it says which GPUs reach which
    "enable_prefix_caching": False,  # copies would find the blocks of shared SAEs
    "async_scheduling": False,  # steps would depend on time, and sums on steps
    "max_num_batched_tokens": 640,
    "max_num_seqs": 16,
    "max_model_len": 256,
    "block_size": 16,
    "num_gpu_blocks_override": 130,  # fewer than 16 long requests need
    "gpu_memory_utilization": 0.1,
    # Graphs alone: compiling takes most of a start, and test_shards_gpu.py compiles.
    "compilation_config": {
        "mode": 0,
        "cudagraph_mode": "FULL_DECODE_ONLY",
        "cudagraph_capture_sizes": [1, 2, 4, 8, 16],
    },
}
TOLERANCE = 1e-2  # of a log-probability; a float16 engine is off by 2e-3


def check_short(llm: LLM) -> None:
    """One batch of every tier, point, phase and activation."""
    asked = requests()
    prompts = [prompt(500 + at, 5 + at % 7) for at in range(len(asked))]
    found = answers(llm, prompts, asked, 6)
    check_oracle(found, prompts, asked, TOLERANCE)
    print("a batch of every kind is Hugging Face's", flush=True)
    check_bits(llm, prompts, asked, 6)
    print("a batch of every kind has the bits of copies", flush=True)


def check_long(llm: LLM) -> None:
    """Prompts in chunks, and requests that lose their place."""
    asked = requests()
    prompts = [prompt(900 + at, 100 + 13 * at % 120) for at in range(len(asked))]
    with steps_of(llm) as steps:
        found = check_bits(llm, prompts, asked, 24)
    assert steps.preempted > 3 and steps.chunks > 3, steps
    # A long text meets too many near ties of TopK.
    chosen = [
        at for at, asks in enumerate(asked) if all(a.module != "topk" for a in asks)
    ]
    check_oracle(
        [found[at] for at in chosen],
        [prompts[at] for at in chosen],
        [asked[at] for at in chosen],
        TOLERANCE,
    )
    print(f"chunks and preemption: {steps.chunks}, {steps.preempted}", flush=True)


@contextmanager
def sharing(
    ranks: int, modules: dict[str, Any], root: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[LLM]:
    """An engine whose ranks store into each other's memory in every graph."""
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} CUDA devices")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    monkeypatch.setenv("VLLM_ALLREDUCE_USE_SYMM_MEM", "0")
    monkeypatch.setenv("VLLM_ALLREDUCE_USE_FLASHINFER", "0")
    monkeypatch.setenv(PEER_MEMORY_ENV, "1")
    monkeypatch.setattr(matrix, "TIE", peer_engines.TIE)
    options = {**OPTIONS, "tensor_parallel_size": ranks}
    steering = {"spare": [peer_engines.SPARE]}
    with engine(peer_engines.FAMILY, root, modules, steering, **options) as llm:
        before = llm.collective_rpc(rounds_of)
        assert min(before) >= 0, "the ranks gather"
        yield llm


def check_short_in_graphs(llm: LLM) -> None:
    """`check_short`, whose steps run graphs in which the ranks exchange."""
    before = llm.collective_rpc(rounds_of)
    with steps_of(llm) as steps:
        check_short(llm)
    assert steps.graphs["FULL"] > 0, steps
    after = llm.collective_rpc(rounds_of)
    assert len(set(after)) == 1 and after[0] > before[0] + 100, (before, after)


@pytest.mark.parametrize("ranks", [2, 4])
def test_gpus_that_share_saes_through_their_memory_agree(
    ranks: int, model_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = peer_engines.save(tmp_path)
    with sharing(ranks, modules, model_root, monkeypatch) as llm:
        check_short_in_graphs(llm)
        check_long(llm)
        for kind in peer_engines.KINDS:
            check_reading(llm, kind, 2 * TOLERANCE)
        print("reading: done", flush=True)
        check_late_modules(llm, tmp_path, TOLERANCE)


@pytest.mark.skipif(not can_screen(torch.float16), reason="needs Hopper's kernels")
def test_gpus_that_screen_what_they_share_have_the_bits_of_copies(
    model_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steering_screening, "AUTO_SCREENED_BYTES", 1)
    modules = peer_engines.save(tmp_path, screening="auto")
    with sharing(2, modules, model_root, monkeypatch) as llm:
        check_short_in_graphs(llm)
        assert all(llm.collective_rpc(has_screened))
        check_long(llm)
