# SPDX-License-Identifier: Apache-2.0
"""Keeps the last steps of an engine's reading, whole, at the front end.

A step is appended as it arrives. A request takes its rows when its output is made, or
when the log is emptied. That happens every `MAX_STEPS` steps, so that a long request
does not keep the rows of others. Consecutive steps of the same batch form one segment,
in which a request's rows are one slice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakValueDictionary

import numpy as np

from vllm.config.sae_readout_step import ReadPlaces, StepRows

MAX_STEPS = 64
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
        """The positions from `start` to `stop`, or None if there are none."""
        low = max(start - self.first, 0)
        high = min(stop - self.first, self.count)
        if low >= high:
            return None
        if (low, high) == (0, self.count):
            return self
        rows = [None if rows is None else rows[low:high] for rows in self.rows]
        return Chunk(self.first + low, high - low, rows)


class Segment:
    """Consecutive steps in which the same requests had the same numbers of tokens."""

    def __init__(self, step: StepRows, number: int):
        self.number = number  # of its first step
        self.req_ids = step.req_ids
        self.spans = step.spans
        self.steps: list[Mapping[int, np.ndarray]] = [step.rows]
        self._next = self._after(step.spans)
        self._spans: dict[str, list[int]] = {}
        # By slot, all steps: `[rows, steps, width]`, made when it is asked for.
        self._blocks: dict[int, np.ndarray] = {}

    @staticmethod
    def _after(spans: np.ndarray) -> np.ndarray:
        """The spans of a step that continues where this one ends."""
        after = spans.copy()
        after[1] += spans[2]
        return after

    def extend(self, step: StepRows) -> bool:
        """Append a step, if it continues where the last one ended."""
        first = self.steps[0]
        goes_on = (
            np.array_equal(step.spans, self._next)
            and step.req_ids == self.req_ids
            and step.rows.keys() == first.keys()
            and all(rows.shape == first[slot].shape for slot, rows in step.rows.items())
        )
        if goes_on:
            self.steps.append(step.rows)
            self._next = self._after(step.spans)
            self._blocks.clear()
        return goes_on

    def cut(self, req_id: str, skip: int, slots: Sequence[int]) -> Chunk | None:
        """A request's rows at some slots, without the first steps."""
        if not self._spans:
            spans = self.spans.T.tolist()
            self._spans = dict(zip(self.req_ids, spans, strict=True))
        first, start, count = self._spans.get(req_id, (0, 0, 0))
        if not count:
            return None
        kept = len(self.steps) - skip
        rows: list[np.ndarray | None] = []
        for slot in slots:
            if slot not in self.steps[0]:
                rows.append(None)
            elif kept == 1:
                rows.append(self.steps[-1][slot][first : first + count].copy())
            elif count == 1:
                rows.append(self._block(slot)[first, skip:].copy())
            else:
                own = self._block(slot)[first : first + count, skip:]
                width = own.shape[2]
                rows.append(own.transpose(1, 0, 2).reshape(-1, width).copy())
        if all(found is None for found in rows):
            return None
        return Chunk(start + skip * count, kept * count, rows)

    def _block(self, slot: int) -> np.ndarray:
        if slot not in self._blocks:
            self._blocks[slot] = np.stack([rows[slot] for rows in self.steps], axis=1)
        return self._blocks[slot]


class LogReader:
    """A request's view of a log: where it reads, and how far it has taken rows."""

    def __init__(self, log: ReadLog, req_id: str):
        self.slots: Sequence[int] = ()
        self.d_sae: Sequence[int] = ()
        self.chunks: list[Chunk] = []
        self._log = log
        self._req_id = req_id
        self._taken = log.end
        log.readers[req_id] = self

    def pull(self) -> None:
        """Take the request's rows from the log; a later row of a position wins."""
        segments, since = self._log.segments, self._taken
        self._taken = self._log.end
        for segment in segments:
            skip = max(since - segment.number, 0)
            if skip >= len(segment.steps):
                continue
            chunk = segment.cut(self._req_id, skip, self.slots)
            if chunk is not None:
                self._append(chunk)

    def _append(self, chunk: Chunk) -> None:
        """Put a chunk in the place of its positions; what lies after them stays.

        A preempted request computes its positions again from the first one, and an
        output may be made before it has come as far as it was.
        """
        after: list[Chunk] = []
        while self.chunks and self.chunks[-1].end > chunk.first:
            old = self.chunks.pop()
            if (tail := old.between(chunk.end, old.end)) is not None:
                after.append(tail)
            if (head := old.between(old.first, chunk.first)) is not None:
                self.chunks.append(head)
        self.chunks += [chunk, *reversed(after)]


class ReadLog:
    """The steps that some reading request has not taken yet."""

    def __init__(self) -> None:
        self.segments: list[Segment] = []
        self.end = 0  # steps that have arrived
        # A request that is forgotten drops out.
        self.readers: WeakValueDictionary[str, LogReader] = WeakValueDictionary()
        self._steps = 0
        self._bytes = 0

    def add(self, step: StepRows) -> None:
        """Append a step. Every `MAX_STEPS` steps, all requests take their rows."""
        for req_id, places in step.new.items():
            self._introduce(req_id, places)
        if not self.segments or not self.segments[-1].extend(step):
            self.segments.append(Segment(step, self.end))
        self.end += 1
        self._steps += 1
        self._bytes += step.num_bytes
        if self._steps >= MAX_STEPS or self._bytes >= MAX_BYTES:
            self.empty()

    def _introduce(self, req_id: str, places: ReadPlaces) -> None:
        reader = self.readers.get(req_id)
        if reader is not None:
            reader.slots, reader.d_sae = places

    def empty(self) -> None:
        """Let every request take its rows, and forget the steps."""
        for reader in list(self.readers.values()):
            reader.pull()
        self.segments.clear()
        self._steps = self._bytes = 0
