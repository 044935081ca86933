# SPDX-License-Identifier: Apache-2.0
"""Row allocation: which table row a request's edits of one tier occupy.

A row holds one distinct content: the edits of one tier in one piece of a schedule.
Requests with the same content share a row by reference count. Tables hold `max_pieces *
max_num_seqs + 1` rows and a request has at most `max_pieces`, so `acquire` cannot fail.
Allocation depends only on the sequence of calls, so every rank allocates alike,
whichever layers it owns.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from vllm.config.sae_steering_edits import SiteEdit
from vllm.config.steering import Tier

Edits = Sequence[SiteEdit]


class RowManager:
    """Allocates the rows of one tier.

    Args:
        num_rows: rows of every table, the unsteered row 0 included.
    """

    tier: Tier

    def __init__(self, num_rows: int):
        if num_rows < 1:
            raise ValueError(f"num_rows must be at least 1, got {num_rows}")
        self.num_rows = num_rows
        self._free = list(range(num_rows - 1, 0, -1))
        # By row: how many hold it, and the key of what it holds.
        self._users = [0] * num_rows
        self._keys = [""] * num_rows
        self._row_of: dict[str, int] = {}
        self._changed: dict[int, Edits] = {}

    @property
    def rows_in_use(self) -> int:
        """Rows that some request holds."""
        return len(self._row_of)

    def acquire(self, key: str, edits: Edits) -> int:
        """The row that holds `edits`, shared with every holder of the same `key`.

        Args:
            key: identifies the content: equal keys mean equal edits and weights.
            edits: what the row does, for the table writer.

        Returns:
            a row in `1..num_rows - 1`.
        """
        row = self._row_of.get(key)
        if row is not None:
            self._users[row] += 1
            return row
        row = self._free.pop()
        self._users[row] = 1
        self._keys[row] = key
        self._row_of[key] = row
        self._changed[row] = edits
        return row

    def release(self, row: int) -> bool:
        """Give back one hold on `row`; whether it is free now. Row 0 is ignored."""
        if row == 0:
            return False
        self._users[row] -= 1
        if self._users[row]:
            return False
        del self._row_of[self._keys[row]]
        self._changed.pop(row, None)
        self._free.append(row)
        return True

    @property
    def held(self) -> Collection[int]:
        """The rows that some request holds."""
        return self._row_of.values()

    def key_of(self, row: int) -> str:
        """The key of what a held row holds."""
        return self._keys[row]

    def take_changes(self) -> dict[int, Edits]:
        """Take the rows whose tables must be written before the next forward."""
        changed, self._changed = self._changed, {}
        return changed

    def check_integrity(self) -> None:
        """Raise AssertionError unless every row is free or held, once, by one key."""
        held, free = set(self._row_of.values()), set(self._free)
        assert len(free) == len(self._free), "a row is free twice"
        assert not held & free, "a row is both free and held"
        assert held | free == set(range(1, self.num_rows)), "a row is lost"
        used = {row for row, users in enumerate(self._users) if users}
        assert used == held, "a row without user, or a user without row"
        assert all(users >= 0 for users in self._users), "a row given back twice"
        owners = {self.key_of(row): row for row in held}
        assert owners == self._row_of, "keys and rows disagree"
        assert set(self._changed) <= held, "a free row awaits writing"


class SteeringVectorManager(RowManager):
    """Rows of the additive tier."""

    tier = Tier.ADDITIVE
