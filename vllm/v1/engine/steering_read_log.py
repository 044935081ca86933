# SPDX-License-Identifier: Apache-2.0
"""The last steps of an engine's reading, kept whole at the front end.

A step is appended as it arrives. A request takes its rows when its output is made, or
when the log is emptied: every `MAX_STEPS` steps, so that a request that lives long does
not keep the rows of others. Steps of one batch that follow one another are one segment,
from which a request's rows are one slice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakValueDictionary

import numpy as np

from vllm.config.sae_readout_step import Places, StepRows

MAX_STEPS = 32
MAX_BYTES = 16 << 20


@dataclass(frozen=True)
class Chunk:
    """A request's rows of consecutive positions.

    Attributes:
        first: the first position.
        count: how many positions.
        rows: for each read, int32 `[count, width]`, or None where nothing was read.
    """

    first: int
    count: int
    rows: list[np.ndarray | None]

    @property
    def end(self) -> int:
        """One past the last position."""
        return self.first + self.count

    def between(self, start: int, stop: int) -> Chunk | None:
        """The positions from `start` to `stop`; None: there are none."""
        low = max(start - self.first, 0)
        high = min(stop - self.first, self.count)
        if low >= high:
            return None
        if (low, high) == (0, self.count):
            return self
        rows = [None if rows is None else rows[low:high] for rows in self.rows]
        return Chunk(self.first + low, high - low, rows)


class Segment:
    """Consecutive steps in which the same requests had as many tokens each."""

    def __init__(self, step: StepRows, number: int):
        self.number = number  # of its first step
        self.req_ids = step.req_ids
        self.firsts, self.starts, self.counts = step.spans
        self.steps: list[Mapping[int, np.ndarray]] = [step.rows]
        self._next = self.starts + self.counts
        self._places: dict[str, int] | None = None
        # By slot, all steps: `[steps, rows, width]`, made when it is asked for.
        self._stacked: dict[int, np.ndarray] = {}

    def extend(self, step: StepRows) -> bool:
        """Append a step, if it goes on where the last one ended."""
        firsts, starts, counts = step.spans
        goes_on = (
            np.array_equal(starts, self._next)
            and np.array_equal(counts, self.counts)
            and np.array_equal(firsts, self.firsts)
            and step.req_ids == self.req_ids
            and step.rows.keys() == self.steps[0].keys()
            and all(r.shape == self.steps[0][s].shape for s, r in step.rows.items())
        )
        if goes_on:
            self.steps.append(step.rows)
            self._next = starts + counts
            self._stacked.clear()
        return goes_on

    def place(self, req_id: str) -> int | None:
        """The request's place in the batch; None: it is not there."""
        if self._places is None:
            self._places = {req_id: at for at, req_id in enumerate(self.req_ids)}
        return self._places.get(req_id)

    def cut(self, at: int, skip: int, slots: Sequence[int]) -> Chunk | None:
        """The rows of the request at a place, without those of the first steps."""
        count = int(self.counts[at])
        first = int(self.firsts[at])
        kept = len(self.steps) - skip
        rows: list[np.ndarray | None] = []
        for slot in slots:
            if slot not in self.steps[0]:
                rows.append(None)
            elif kept == 1:
                rows.append(self.steps[-1][slot][first : first + count].copy())
            else:
                block = self._stack(slot)[skip:, first : first + count]
                rows.append(np.array(block).reshape(kept * count, -1))
        if not count or all(found is None for found in rows):
            return None
        return Chunk(int(self.starts[at]) + skip * count, kept * count, rows)

    def _stack(self, slot: int) -> np.ndarray:
        if slot not in self._stacked:
            self._stacked[slot] = np.stack([rows[slot] for rows in self.steps])
        return self._stacked[slot]


class Reader:
    """What follows a request in a log: where it reads, and how far it has taken."""

    def __init__(self, log: ReadLog, req_id: str):
        self.slots: Sequence[int] = ()
        self.d_sae: Sequence[int] = ()
        self.chunks: list[Chunk] = []
        self._log = log
        self._req_id = req_id
        self._taken = log.end
        log.readers[req_id] = self

    def pull(self) -> None:
        """Take what the log has of the request; positions that come again replace."""
        segments, since = self._log.segments, self._taken
        self._taken = self._log.end
        for segment in segments:
            skip = max(since - segment.number, 0)
            if skip >= len(segment.steps):
                continue
            at = segment.place(self._req_id)
            chunk = None if at is None else segment.cut(at, skip, self.slots)
            if chunk is not None:
                self._append(chunk)

    def _append(self, chunk: Chunk) -> None:
        while self.chunks and self.chunks[-1].end > chunk.first:
            before = self.chunks.pop().between(0, chunk.first)
            if before is not None:
                self.chunks.append(before)
        self.chunks.append(chunk)


class ReadLog:
    """The steps that some reading request has not taken yet."""

    def __init__(self) -> None:
        self.segments: list[Segment] = []
        self.end = 0  # steps that have arrived
        # A request that is forgotten drops out.
        self.readers: WeakValueDictionary[str, Reader] = WeakValueDictionary()
        self._steps = 0
        self._bytes = 0

    def add(self, step: StepRows) -> None:
        """Append a step; now and then all requests take theirs."""
        for req_id, places in step.new.items():
            self._introduce(req_id, places)
        if not self.segments or not self.segments[-1].extend(step):
            self.segments.append(Segment(step, self.end))
        self.end += 1
        self._steps += 1
        self._bytes += step.num_bytes
        if self._steps >= MAX_STEPS or self._bytes >= MAX_BYTES:
            self.empty()

    def _introduce(self, req_id: str, places: Places) -> None:
        reader = self.readers.get(req_id)
        if reader is not None:
            reader.slots, reader.d_sae = places

    def empty(self) -> None:
        """Let every request take its rows, and forget the steps."""
        for reader in list(self.readers.values()):
            reader.pull()
        self.segments.clear()
        self._steps = self._bytes = 0
