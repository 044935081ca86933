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
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import numpy as np

from vllm.config.sae_readout_step import ReadPlaces, StepLayout, StepRows

if TYPE_CHECKING:
    from vllm.v1.engine.output_processor import RequestState

MAX_STEPS = 512
MAX_BYTES = 32 << 20
# A request with at least one in so many of a step's rows does not copy them.
SHARE = 8
ARRAY_BYTES = 200


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

    @property
    def size(self) -> int:
        """Bytes, about: of the rows, and of the objects that hold them."""
        return sum(ARRAY_BYTES + own.nbytes for own in self.rows if own is not None)

    def fits(self, other: Chunk) -> bool:
        """Whether both have rows of the same widths."""
        return _widths(self.rows) == _widths(other.rows)

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


def _widths(rows: Sequence[np.ndarray | None]) -> list[int]:
    return [-1 if own is None else own.shape[1] for own in rows]


def joined(chunks: Sequence[Chunk]) -> list[Chunk]:
    """The same rows in fewer chunks: neighbours with rows of the same widths in one."""
    runs: list[list[Chunk]] = []
    for chunk in chunks:
        if runs and runs[-1][-1].end == chunk.first and runs[-1][0].fits(chunk):
            runs[-1].append(chunk)
        else:
            runs.append([chunk])
    found = []
    for run in runs:
        rows = [
            None if parts[0] is None else np.concatenate(parts)
            for parts in zip(*(chunk.rows for chunk in run), strict=True)
        ]
        found.append(Chunk(run[0].first, sum(chunk.count for chunk in run), rows))
    return found


class Segment:
    """Consecutive steps of the same requests, each with as many tokens as before.

    Attributes:
        number: of the first step.
        layout: of the first step.
        steps: the rows of each step, by slot.
    """

    def __init__(self, number: int, layout: StepLayout):
        self.number = number
        self.layout = layout
        self.steps: list[Mapping[int, np.ndarray]] = []
        self._spans: dict[str, list[int]] = {}
        # By slot, of so many steps: `[rows, steps, width]`, made when it is asked for.
        self._blocks: dict[int, np.ndarray] = {}

    def cut(self, req_id: str, skip: int, slots: Sequence[int]) -> Chunk | None:
        """A request's rows at some slots, without the first steps."""
        if not self._spans:
            spans = self.layout.spans.T.tolist()
            self._spans = dict(zip(self.layout.req_ids, spans, strict=True))
        first, start, count = self._spans.get(req_id, (0, 0, 0))
        if not count:
            return None
        kept = len(self.steps) - skip
        rows: list[np.ndarray | None] = []
        for slot in slots:
            if slot not in self.steps[0]:
                rows.append(None)
            elif kept == 1:
                whole = self.steps[-1][slot]
                own = whole[first : first + count]
                # A view keeps the rows of the others too.
                rows.append(own if SHARE * count >= len(whole) else own.copy())
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
        block = self._blocks.get(slot)
        if block is None or block.shape[1] < len(self.steps):
            block = np.stack([rows[slot] for rows in self.steps], axis=1)
            self._blocks[slot] = block
        return block


class LogReader:
    """A request's view of a log: where it reads, and how far it has taken rows."""

    def __init__(self, log: ReadLog, req_id: str):
        self.slots: Sequence[int] = ()
        self.d_sae: Sequence[int] = ()
        self.chunks: list[Chunk] = []
        self.log = log
        self._req_id = req_id
        self._taken = log.end
        log.readers[req_id] = self

    def pull(self) -> None:
        """Take the request's rows from the log; a later row of a position wins."""
        segments, since = self.log.segments, self._taken
        self._taken = self.log.end
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
    """The steps that some reading request has not taken yet.

    Args:
        max_steps: it is emptied when it holds so many.
    """

    def __init__(self, max_steps: int = MAX_STEPS) -> None:
        self.max_steps = max_steps
        self.segments: list[Segment] = []
        self.end = 0  # steps that have arrived
        # Where a step goes on that continues one that was forgotten.
        self._next: StepLayout | None = None
        # A request that is forgotten drops out.
        self.readers: WeakValueDictionary[str, LogReader] = WeakValueDictionary()
        # States of streams whose clients take too little, until they are ended.
        self.unread: list[RequestState] = []
        self._steps = 0
        self._bytes = 0

    def add(self, step: StepRows) -> None:
        """Append a step. Every `max_steps` steps, all requests take their rows."""
        for req_id, places in step.new.items():
            self._introduce(req_id, places)
        if step.layout is not None or not self.segments:
            layout = step.layout or self._next
            assert layout is not None, "the first step has a layout"
            self.segments.append(Segment(self.end, layout))
        self.segments[-1].steps.append(step.rows)
        self.end += 1
        self._steps += 1
        self._bytes += step.num_bytes
        if self._steps >= self.max_steps or self._bytes >= MAX_BYTES:
            self.empty()

    def _introduce(self, req_id: str, places: ReadPlaces) -> None:
        reader = self.readers.get(req_id)
        if reader is not None:
            reader.slots, reader.d_sae = places

    def empty(self) -> None:
        """Let every request take its rows, and forget the steps."""
        for reader in list(self.readers.values()):
            reader.pull()
        if self.segments:
            last = self.segments[-1]
            self._next = last.layout.after(len(last.steps))
        self.segments.clear()
        self._steps = self._bytes = 0
