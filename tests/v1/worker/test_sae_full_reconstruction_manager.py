# SPDX-License-Identifier: Apache-2.0
"""Row allocation never loses, leaks or doubles a row, whatever the order of calls."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    precondition,
    rule,
)

from vllm.config.sae_steering_edits import SiteEdit
from vllm.config.sae_steering_types import SAEClampEntry
from vllm.config.steering_points import HookPoint
from vllm.v1.worker.sae_clamp_manager import SAEClampManager
from vllm.v1.worker.sae_full_reconstruction_manager import SAEFullReconstructionManager
from vllm.v1.worker.steering_manager import SteeringVectorManager

KEYS = [f"key-{n}" for n in range(12)]
MAX_SEQS = 4


def edits(key: str) -> tuple[SiteEdit, ...]:
    clamp = SAEClampEntry(KEYS.index(key), "absolute", 1.0)
    return (SiteEdit("m", HookPoint.POST_BLOCK, 0, (clamp,)),)


class Rows(RuleBasedStateMachine):
    """A model of requests that come and go, beside the manager."""

    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.manager = SAEFullReconstructionManager(2 * MAX_SEQS + 1)
        self.holds: dict[int, list[str]] = {}
        self.written: dict[int, str] = {}

    @precondition(lambda self: sum(map(len, self.holds.values())) < 2 * MAX_SEQS)
    @rule(target=held, key=st.sampled_from(KEYS))
    def acquire(self, key: str) -> int:
        row = self.manager.acquire(key, edits(key))
        assert 1 <= row <= 2 * MAX_SEQS
        assert set(self.holds.get(row, [key])) == {key}, "a row holds two contents"
        self.holds.setdefault(row, []).append(key)
        return row

    @rule(row=consumes(held))
    def release(self, row: int) -> None:
        self.manager.release(row)
        self.holds[row].pop()
        if not self.holds[row]:
            del self.holds[row]

    @rule()
    def write(self) -> None:
        for row, content in self.manager.take_changes().items():
            self.written[row] = KEYS[content[0].clamps[0].feature_idx]
        for row, keys in self.holds.items():
            assert self.written[row] == keys[0], "a held row has stale content"

    @invariant()
    def is_sound(self) -> None:
        self.manager.check_integrity()
        assert self.manager.rows_in_use == len(self.holds)


TestRows = Rows.TestCase
TestRows.settings = settings(max_examples=60, stateful_step_count=40)


def test_equal_content_shares_a_row_and_is_written_once() -> None:
    manager = SAEFullReconstructionManager(5)
    first = manager.acquire("a", edits(KEYS[0]))
    assert manager.acquire("a", edits(KEYS[0])) == first
    assert list(manager.take_changes()) == [first]
    assert manager.take_changes() == {}


def test_a_row_stays_until_its_last_user_gives_it_back() -> None:
    manager = SAEFullReconstructionManager(3)
    row = manager.acquire("a", ())
    manager.acquire("a", ())
    manager.release(row)
    assert manager.acquire("b", ()) != row
    manager.release(row)
    assert manager.acquire("c", ()) == row


def test_a_full_batch_of_distinct_two_phase_requests_always_fits() -> None:
    manager = SAEClampManager(2 * MAX_SEQS + 1)
    rows = {manager.acquire(f"{n}", ()) for n in range(2 * MAX_SEQS)}
    assert rows == set(range(1, 2 * MAX_SEQS + 1))


def test_allocation_depends_on_the_calls_alone() -> None:
    def run() -> list[int]:
        manager = SteeringVectorManager(9)
        rows = [manager.acquire(key, ()) for key in ("x", "y", "z")]
        manager.release(rows[1])
        manager.release(rows[0])
        return [*rows, manager.acquire("v", ()), manager.acquire("w", ())]

    assert run() == run() == [1, 2, 3, 1, 2]


def test_row_zero_is_nobodys() -> None:
    manager = SAEFullReconstructionManager(2)
    manager.release(0)
    assert manager.acquire("a", ()) == 1
    manager.check_integrity()


def test_a_table_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="num_rows must be at least 1, got 0"):
        SAEFullReconstructionManager(0)
