# SPDX-License-Identifier: Apache-2.0
"""Steps that have been read, on their way from the scheduler to the front ends.

While the same requests decode, a step says nothing of them: it carries its rows, and
the front end goes on counting (`StepLayout.after`). So such a step costs a few array
operations, however many requests read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

import numpy as np

from vllm.config.sae_readout_step import (
    ReadPlaces,
    StepLayout,
    StepReadout,
    StepRows,
    Wire,
)

# After this many waiting steps, those of ended requests are dropped.
MAX_WAITING = 64


class Outbox:
    """The steps that no output has carried yet, by client."""

    def __init__(self) -> None:
        self._waiting: dict[int, list[StepRows]] = {}
        # Of the step before: who sent it, and its form.
        self._sender: object = None
        self._first_rows: np.ndarray = np.zeros(0, dtype=np.int64)
        self._counts: np.ndarray = np.zeros(0, dtype=np.int64)
        self._next: np.ndarray = np.zeros(0, dtype=np.int64)
        self._shapes: dict[int, tuple[int, ...]] = {}
        # Where several clients read: the rows of each one.
        self._wanted: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return sum(len(steps) for steps in self._waiting.values())

    def put(
        self,
        sender: object,
        readout: StepReadout,
        starts: np.ndarray,
        counts: np.ndarray,
        clients: Mapping[int, Sequence[int]],
        new: Mapping[str, ReadPlaces],
    ) -> None:
        """Keep a step for its clients.

        Args:
            sender: the batch; as long as it is the same object, so are its requests.
            readout: of the step.
            starts: int64 `[n]`, position of each request's first token.
            counts: int64 `[n]`, how many of its tokens count.
            clients: places of each client's requests.
            new: requests that the front ends do not know yet.
        """
        if self._goes_on(sender, readout, starts, counts):
            for client in clients:
                self._keep(client, StepRows(None, self._rows_of(client, readout)))
            return
        whole = StepLayout(
            readout.req_ids, np.stack([readout.first_rows, starts, counts])
        )
        self._wanted.clear()
        for client, places in clients.items():
            layout = whole
            if len(clients) > 1:
                layout, self._wanted[client] = whole.part(places)
            own = {at: new[at] for at in layout.req_ids if at in new} if new else {}
            self._keep(client, StepRows(layout, self._rows_of(client, readout), own))

    def _goes_on(
        self,
        sender: object,
        readout: StepReadout,
        starts: np.ndarray,
        counts: np.ndarray,
    ) -> bool:
        """Whether a step continues the one before; notes its form."""
        shapes = {slot: rows.shape for slot, rows in readout.rows.items()}
        goes_on = (
            sender is self._sender
            and _same(readout.first_rows, self._first_rows)
            and _same(counts, self._counts)
            and _same(starts, self._next)
            and shapes == self._shapes
        )
        if not goes_on:
            self._sender, self._shapes = sender, shapes
            self._first_rows, self._counts = readout.first_rows, counts
        self._next = starts + counts
        return goes_on

    def _rows_of(self, client: int, readout: StepReadout) -> Mapping[int, np.ndarray]:
        if not self._wanted:
            return readout.rows
        wanted = self._wanted[client]
        return {slot: rows[wanted] for slot, rows in readout.rows.items()}

    def _keep(self, client: int, step: StepRows) -> None:
        self._waiting.setdefault(client, []).append(step)

    def drop_ended(self, known: Set[str]) -> None:
        """Where many steps wait, drop those whose requests have all ended.

        Args:
            known: ids of the requests that have not ended.
        """
        for waiting in self._waiting.values():
            if len(waiting) <= MAX_WAITING:
                continue
            kept: list[StepRows] = []
            keep = True  # Steps before the first layout continue one that was sent.
            for step in waiting:
                if step.layout is not None:
                    keep = not known.isdisjoint(step.layout.req_ids)
                if keep:
                    kept.append(step)
            waiting[:] = kept
            # The next step must not continue one that was dropped.
            self._sender = None

    def take(self, client: int) -> list[Wire]:
        """The waiting steps of a client, which is about to get them."""
        return [step.to_wire() for step in self._waiting.pop(client, ())]


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    return one is other or (len(one) == len(other) and bool((one == other).all()))
