# SPDX-License-Identifier: Apache-2.0
"""Two data-parallel ranks behind two API servers: modules change on both or on none."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from steering_testing.engine import FULL
from steering_testing.modules_http import (
    KEY,
    MODULES,
    ask,
    complete,
    register,
    remove,
    save_modules,
    steering_server,
    tokens,
)
from steering_testing.requests import Ask, vector
from steering_testing.server import MODEL_NAME

pytestmark = [pytest.mark.server, pytest.mark.slow]

RANKS = (0, 1)
LONG = 3500  # tokens of an answer that takes the engine many seconds


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_modules(tmp_path_factory.mktemp("root").resolve())


@pytest.fixture(scope="module")
def url(
    model_root: Path, root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    log = tmp_path_factory.mktemp("server") / "log"
    arguments = ("--data-parallel-size", "2", "--api-server-count", "2")
    arguments += ("--steering-inline-vectors", "post_block.1=1")
    with steering_server(model_root, root, log, {}, *arguments) as server:
        yield server.url


def answers(url: str) -> list[list[int]]:
    """The answer of each rank, asked several times for each API server to get one."""
    found = [[tokens(ask(url, "hot", 8, rank)) for _ in range(4)] for rank in RANKS]
    assert all(answer == of_rank[0] for of_rank in found for answer in of_rank)
    return [of_rank[0] for of_rank in found]


def ask_plain(url: str, max_tokens: int, rank: int) -> httpx.Response:
    """A completion that names no module."""
    return complete(url, {}, max_tokens, rank)


def with_vector(url: str, rank: int, *given: torch.Tensor) -> httpx.Response:
    """A completion under vectors that the request brings."""
    specs = [Ask("additive", vector=one, scale=4.0) for one in given]
    body = {"model": MODEL_NAME, "prompt": [5, 6, 7, 8], "max_tokens": 8}
    body |= {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
    body |= {"detokenize": False, "steering_vector_specs": [s.spec() for s in specs]}
    headers = {"X-data-parallel-rank": str(rank)}
    return httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=300)


def test_every_rank_takes_the_vectors_of_requests(url: str) -> None:
    found = [
        [tokens(with_vector(url, rank, vector(seed))) for rank in RANKS for _ in "1234"]
        for seed in (1, 2)
    ]
    first, second = (answers_of[0] for answers_of in found)
    assert found == [[first] * 8, [second] * 8]
    plain = tokens(with_vector(url, 0))
    assert len({tuple(first), tuple(second), tuple(plain)}) == 3
    beyond = with_vector(url, 1, vector(1), vector(2))
    assert beyond.status_code == 400
    assert "inline_vectors" in beyond.json()["error"]["message"]


def listed(url: str) -> list[dict[str, Any]]:
    return httpx.get(url + MODULES, headers=KEY, timeout=120).json()["modules"]


def test_both_ranks_get_a_module_another_and_none(url: str, root: Path) -> None:
    assert register(url, root).status_code == 201
    first = answers(url)
    assert register(url, root, path=str(root / "two"), replace=True).status_code == 201
    second = answers(url)
    assert first[0] == first[1] != second[0] == second[1]
    assert remove(url).status_code == 200
    assert [ask(url, "hot", rank=rank).status_code for rank in RANKS] == [400, 400]


def test_presets_and_the_default_change_on_both_ranks(url: str, root: Path) -> None:
    assert register(url, root).status_code == 201
    steered = answers(url)[0]
    preset = {FULL: [{"module_name": "hot"}]}
    presets, default = f"{url}/v1/steering/presets", f"{url}/v1/steering/default_preset"
    options: dict[str, Any] = {"headers": KEY, "timeout": 300}
    made = httpx.put(f"{presets}/calm", json=preset, **options)
    assert made.status_code == 200, made.text
    chosen = httpx.put(default, json={"preset": "calm"}, **options)
    assert chosen.status_code == 200, chosen.text
    for rank in RANKS:
        assert {str(tokens(ask_plain(url, 8, rank))) for _ in range(4)} == {
            str(steered)
        }
    assert httpx.delete(f"{presets}/calm", **options).status_code == 409
    assert httpx.put(default, json={"preset": None}, **options).status_code == 200
    for rank in RANKS:
        assert tokens(ask_plain(url, 8, rank)) != steered
    assert httpx.delete(f"{presets}/calm", **options).status_code == 200
    assert remove(url).status_code == 200


def test_a_module_that_no_rank_can_load_changes_nothing(url: str, root: Path) -> None:
    assert register(url, root).status_code == 201
    before = answers(url)
    bad = register(url, root, path=str(root / "nan"), replace=True)
    assert bad.status_code == 400
    assert "nothing was changed" in bad.json()["error"]["message"]
    assert answers(url) == before
    assert remove(url).status_code == 200


@pytest.mark.parametrize("rank", RANKS)
def test_one_busy_rank_keeps_both_as_they_were(url: str, root: Path, rank: int) -> None:
    assert register(url, root).status_code == 201
    before = answers(url)
    done: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: done.append(ask(url, "hot", LONG, rank)))
    thread.start()
    deadline = time.monotonic() + 60
    while not listed(url)[0]["requests"]:
        assert not done, f"the request ended before it was seen: {done[0].text[:300]}"
        assert time.monotonic() < deadline, "the request was never seen"
    other = {"path": str(root / "two"), "replace": True}
    busy = register(url, root, **other)
    assert (busy.status_code, busy.json()["error"]["in_use"]) == (409, 1)
    assert f"data-parallel rank {rank}" in busy.json()["error"]["message"]
    # The idle rank has not changed, and serves the module again.
    idle = 1 - rank
    assert tokens(ask(url, "hot", 8, idle)) == before[idle]
    assert register(url, root, drain=True, **other).status_code == 201
    thread.join()
    assert len(tokens(done[0])) == LONG
    after = answers(url)
    assert after[0] == after[1] != before[0]
    assert remove(url).status_code == 200
