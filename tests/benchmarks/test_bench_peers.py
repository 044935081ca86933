# SPDX-License-Identifier: Apache-2.0
"""What `benchmarks/bench_peers.py` asks of every library, and how it compares."""

from __future__ import annotations

from typing import Any

import bench_peers
import torch
from torch import nn


def identity(size: int) -> dict[str, torch.Tensor]:
    """An SAE that reconstructs what is above 0.5, and nothing else."""
    eye, zeros = torch.eye(size), torch.zeros(size)
    threshold = torch.full((size,), 0.5)
    return {"W_enc": eye, "b_enc": zeros, "threshold": threshold} | {
        "W_dec": eye,
        "b_dec": zeros,
    }


def test_a_prompt_is_edited_but_its_first_token() -> None:
    edit = bench_peers.reconstruct(identity(3))
    x = torch.tensor([[[0.2, 2.0, 0.4], [0.2, 2.0, 0.4]]])
    found = bench_peers.but_first(x, edit)
    assert torch.equal(found[0, 0], x[0, 0])
    assert torch.equal(found[0, 1], torch.tensor([0.0, 2.0, 0.0]))


def test_the_one_token_of_a_step_is_edited() -> None:
    edit = bench_peers.reconstruct(identity(3))
    found = bench_peers.but_first(torch.tensor([[[0.2, 2.0, 0.4]]]), edit)
    assert torch.equal(found, torch.tensor([[[0.0, 2.0, 0.0]]]))


def test_a_hook_is_gone_after_the_block() -> None:
    layer = nn.Identity()
    x = torch.ones(1, 2, 3)
    with bench_peers.hooked(layer, lambda part: part * 2):
        assert torch.equal(layer(x)[0, 1], torch.full((3,), 2.0))
    assert torch.equal(layer(x), x)


def test_tokens_are_compared_with_the_reference() -> None:
    def report(tokens: list[list[int]]) -> dict[str, Any]:
        return {"2 prompts, plain": {"per_second": 1.0, "tokens": tokens}}

    reports = {
        bench_peers.REFERENCE: report([[1, 2], [3, 4]]),
        bench_peers.OURS: report([[1, 2], [3, 9]]),
    }
    bench_peers.compare(reports)
    assert reports[bench_peers.REFERENCE]["2 prompts, plain"]["equal_tokens"] == 1.0
    assert reports[bench_peers.OURS]["2 prompts, plain"]["equal_tokens"] == 0.75
