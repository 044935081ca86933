# SPDX-License-Identifier: Apache-2.0
"""The tokens that each module has edited, against a count token by token."""

from __future__ import annotations

import random
from collections import Counter
from types import SimpleNamespace

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm.config.sae_steering_plan import NO_STOP
from vllm.config.steering import Tier
from vllm.v1.engine.steering_listing import tokens_of_stages
from vllm.v1.worker.steering_counts import PHASES, TokenCounts
from vllm.v1.worker.steering_index import BatchView, RequestRows, StepIndex
from vllm.v1.worker.steering_manager import SteeringVectorManager

NUM_ROWS, NAMES = 40, "abcd"
Names = tuple[str, ...]


class Batch:
    """Requests with random rows of one tier; counts what each module edits."""

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.index = StepIndex(len(Tier))
        self.rows = SteeringVectorManager(NUM_ROWS)
        self.counts = TokenCounts(NUM_ROWS)
        self.computed: dict[str, int] = {}
        self.prompt_len: dict[str, int] = {}
        self.pieces: dict[str, list[tuple[int, int, Names]]] = {}
        self.wanted: Counter[tuple[str, int]] = Counter()

    def add(self, req_id: str) -> None:
        rng = self.rng
        stops = [*sorted({0, *rng.sample(range(-4, 8), rng.randint(0, 2))}), NO_STOP]
        pieces = []
        for stop in stops:
            names = tuple(sorted(rng.sample(NAMES, rng.randint(0, 2))))
            edits = [SimpleNamespace(module=name) for name in names]
            row = self.rows.acquire("".join(names), edits) if names else 0
            pieces.append((stop, row, names))
        self.pieces[req_id] = pieces
        self.computed[req_id] = 0
        self.prompt_len[req_id] = rng.randint(1, 9)
        schedule = [(stop, (row, 0, 0)) for stop, row, _ in pieces]
        self.index.hold(req_id, RequestRows.of_pieces(schedule))

    def drop(self, req_id: str) -> None:
        self.index.drop(req_id)
        for _, row, _ in self.pieces.pop(req_id):
            if self.rows.release(row):
                self.counts.free(Tier.ADDITIVE, row)
        del self.computed[req_id], self.prompt_len[req_id]

    def step(self) -> None:
        ids = [one for one in self.computed if self.rng.random() < 0.9]
        if not ids:
            return
        left = [self.prompt_len[one] - self.computed[one] for one in ids]
        scheduled = [self.rng.randint(1, n) if n > 1 else 1 for n in left]
        view = BatchView(
            req_ids=ids,
            num_scheduled=np.array(scheduled, dtype=np.int32),
            num_computed=np.array([self.computed[i] for i in ids], dtype=np.int32),
            prompt_len=np.array([self.prompt_len[i] for i in ids], dtype=np.int32),
            token_ids=torch.zeros(sum(scheduled), dtype=torch.int32),
        )
        self.index.update(view)
        self.counts.follow(self.index)
        if self.index.rows is not None:  # as the runtime does
            self.counts.hold(Tier.ADDITIVE, self.rows.take_changes())
        for one, tokens in zip(ids, scheduled, strict=True):
            for _ in range(tokens):
                self._expect(one)
                self.computed[one] += 1

    def _expect(self, req_id: str) -> None:
        at = self.computed[req_id] - self.prompt_len[req_id]
        names = next(names for stop, _, names in self.pieces[req_id] if at < stop)
        for name in names:
            self.wanted[name, int(at >= 0)] += 1

    def check(self) -> None:
        found = self.counts.steered()
        for name in NAMES:
            tokens = found.get(name, np.zeros((len(Tier), len(PHASES)), dtype=int))
            assert not tokens[1:].any()
            assert tokens[0].tolist() == [self.wanted[name, 0], self.wanted[name, 1]]


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32))
def test_any_batch_is_counted_as_token_by_token(seed: int) -> None:
    batch = Batch(random.Random(seed))
    for at in range(40):
        chance = batch.rng.random()
        if chance < 0.2 and len(batch.computed) < 8:
            batch.add(f"r{at}")
        elif chance < 0.3 and batch.computed:
            batch.drop(batch.rng.choice(list(batch.computed)))
        elif chance < 0.35:
            batch.check()
        batch.step()
    batch.check()
    for req_id in list(batch.computed):
        batch.drop(req_id)
    batch.check()
    assert not batch.counts._modules, "a freed row is remembered"


def test_vectors_of_requests_are_counted_together() -> None:
    counts = TokenCounts(4)
    edits = [SimpleNamespace(module=f"inline:{at}") for at in range(2)]
    counts.hold(Tier.ADDITIVE, {1: edits})
    index = StepIndex(len(Tier))
    rows = np.array([[1], [0], [0]])
    index.runs = rows, np.array([True]), np.array([5])
    counts.follow(index)
    counts.follow(index)
    (name,) = counts.steered()
    assert name == "(inline)"
    assert counts.steered()[name].tolist() == [[10, 0], [0, 0], [0, 0]]


def test_only_what_stages_of_a_pipeline_do_is_added_up() -> None:
    steered = {"full": {"prefill": 5, "decode": 2}}
    first = {"m": {"steered": steered, "bypassed": 1, "saturated": 0}}
    second = {"m": {"steered": steered, "bypassed": 2, "saturated": 3}}
    found = tokens_of_stages([{"module_tokens": one} for one in (first, second)])
    assert found == {"m": {"steered": steered, "bypassed": 3, "saturated": 3}}
