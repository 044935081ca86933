# SPDX-License-Identifier: Apache-2.0
"""The index of a step, updated from step to step, against one computed from scratch."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm.config.sae_steering_plan import NO_STOP
from vllm.v1.worker.steering_index import BatchView, RequestRows, StepIndex

TIERS = 3
NOTHING = RequestRows.of_phases((0,) * TIERS, (0,) * TIERS)


@dataclass
class Sequence:
    """A request of the simulated batch."""

    req_id: str
    prompt_len: int
    computed: int = 0


def expected(
    view: BatchView, rows_of: dict[str, RequestRows]
) -> tuple[np.ndarray, np.ndarray]:
    """Rows and counts, token after token."""
    columns, steered = [], np.zeros((TIERS, 2), dtype=np.int64)
    for at, req_id in enumerate(view.req_ids):
        for offset in range(int(view.num_scheduled[at])):
            decodes = view.num_computed[at] + offset >= view.prompt_len[at]
            held = rows_of.get(req_id, NOTHING)
            position = view.num_computed[at] + offset - view.prompt_len[at]
            piece = int((held.stops <= position).sum())
            rows = held.rows[piece].tolist()
            columns.append(rows)
            steered[:, int(decodes)] += [row != 0 for row in rows]
    return np.array(columns, dtype=np.int32).reshape(-1, TIERS).T, steered


def make_view(batch: list[Sequence], scheduled: list[int]) -> BatchView:
    return BatchView(
        req_ids=[one.req_id for one in batch],
        num_scheduled=np.array(scheduled, dtype=np.int32),
        num_computed=np.array([one.computed for one in batch], dtype=np.int32),
        prompt_len=np.array([one.prompt_len for one in batch], dtype=np.int32),
        token_ids=torch.zeros(sum(scheduled), dtype=torch.int32),
    )


def check(index: StepIndex, view: BatchView, rows_of: dict[str, RequestRows]) -> None:
    rows, steered = expected(view, rows_of)
    if not rows.any():
        assert index.rows is None
    else:
        assert index.rows is not None
        assert np.array_equal(index.rows, rows)
    assert np.array_equal(index.steered, steered)


def random_rows(rng: random.Random, spans: bool) -> RequestRows:
    """Rows by phase, or of a schedule that also changes within them."""

    def some() -> tuple[int, ...]:
        return tuple(rng.choice([0, 0, rng.randint(1, 9)]) for _ in range(TIERS))

    if not spans or rng.random() < 0.5:
        return RequestRows.of_phases(some(), some())
    stops = {0, NO_STOP, *(rng.randint(-6, 9) for _ in range(rng.randint(0, 4)))}
    return RequestRows.of_pieces([(stop, some()) for stop in sorted(stops)])


@settings(max_examples=100)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_every_step_of_a_random_schedule_has_the_rows_of_its_tokens(
    seed: int, spans: bool
) -> None:
    rng = random.Random(seed)
    index = StepIndex(TIERS)
    batch: list[Sequence] = []
    rows_of: dict[str, RequestRows] = {}
    for step in range(30):
        event = rng.random()
        if event < 0.3:
            batch.append(Sequence(f"r{step}", rng.randint(1, 12)))
            if rng.random() < 0.7:
                rows_of[f"r{step}"] = random_rows(rng, spans)
                index.hold(f"r{step}", rows_of[f"r{step}"])
        elif event < 0.4 and batch:
            gone = batch.pop(rng.randrange(len(batch)))
            if rows_of.pop(gone.req_id, None) is not None:
                index.drop(gone.req_id)
        elif event < 0.5:
            rng.shuffle(batch)
        scheduled = (
            [1] * len(batch)
            if rng.random() < 0.5
            else [
                rng.randint(1, 5)
                if one.computed < one.prompt_len
                else rng.choice([1, 1, 3])
                for one in batch
            ]
        )
        view = make_view(batch, scheduled)
        index.update(view)
        check(index, view, rows_of)
        for one, count in zip(batch, scheduled, strict=True):
            one.computed += count


def holding(rows_of: dict[str, RequestRows]) -> StepIndex:
    index = StepIndex(TIERS)
    for req_id, rows in rows_of.items():
        index.hold(req_id, rows)
    return index


def test_a_batch_that_only_decodes_changes_nothing() -> None:
    rows_of = {"a": RequestRows.of_phases((0, 0, 1), (0, 0, 2))}
    batch = [Sequence("a", 4, 4), Sequence("b", 4, 9)]
    index = holding(rows_of)
    assert index.update(make_view(batch, [1, 1]))
    rows = index.rows
    for one in batch:
        one.computed += 1
    view = make_view(batch, [1, 1])
    assert not index.update(view)
    assert index.rows is rows
    check(index, view, rows_of)


def test_new_rows_of_the_same_batch_are_seen() -> None:
    view = make_view([Sequence("a", 4, 4)], [1])
    index = holding({"a": RequestRows.of_phases((0, 0, 1), (0, 0, 2))})
    index.update(view)
    rows_of = {"a": RequestRows.of_phases((0, 0, 1), (0, 3, 0))}
    index.drop("a")
    index.hold("a", rows_of["a"])
    assert index.update(view)
    check(index, view, rows_of)


def test_more_requests_than_there_were_slots_keep_their_rows() -> None:
    rows_of = {
        f"r{at}": RequestRows.of_phases((0, 0, at), (0, at, 0)) for at in range(1, 40)
    }
    index = holding(rows_of)
    for gone in list(rows_of)[::3]:
        index.drop(gone)
        del rows_of[gone]
    view = make_view([Sequence(f"r{at}", 2) for at in range(1, 40)], [3] * 39)
    index.update(view)
    check(index, view, rows_of)


def test_the_last_prompt_token_and_the_first_answer_part_at_the_position() -> None:
    index = holding({"a": RequestRows.of_phases((0, 0, 1), (0, 0, 2))})
    index.update(make_view([Sequence("a", 4, 2)], [4]))
    assert index.rows is not None
    assert index.rows[2].tolist() == [1, 1, 2, 2]
    assert index.steered[2].tolist() == [2, 2]
