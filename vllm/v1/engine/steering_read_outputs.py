# SPDX-License-Identifier: Apache-2.0
"""The front end's side of reading: from rows to what clients get.

A request's rows stay as they are until somebody asks for its features. So the loop that
steps the engine makes no records.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm.config.sae_features import (
    NOT_READ,
    ReadFeatures,
    SAEFeatures,
    join,
    to_record,
)
from vllm.config.sae_readout_specs import SiteRead
from vllm.config.sae_steering_specs import READOUT_KEY
from vllm.config.steering_json import JsonView
from vllm.config.steering_points import HookPoint
from vllm.v1.engine.steering_read_log import Chunk, LogReader, ReadLog, joined

# So many pieces of a request are joined.
MANY_CHUNKS = 64


class AskedReads:
    """What a request asks to read, looked at when its features are asked for.

    Args:
        extra_args: of the request, with the canonical specs.
    """

    def __init__(self, extra_args: JsonView):
        self._specs = extra_args.get(READOUT_KEY) or ()

    @functools.cached_property
    def reads(self) -> tuple[SiteRead, ...]:
        """In the order in which the engine has them."""
        return canonical_reads(self._specs)


@dataclass(frozen=True, eq=False)
class PendingFeatures:
    """What a request has read, as rows.

    Attributes:
        asked: by the request.
        d_sae: F at each of them.
        chunks: by ascending position.
        size: bytes of the chunks of a delta; 0 for all of an answer.
    """

    asked: AskedReads
    d_sae: Sequence[int]
    chunks: list[Chunk]
    size: int = 0

    def and_then(self, later: PendingFeatures) -> PendingFeatures:
        """These rows, and those of a later output of the request. It takes this
        object's list, so that it costs the same however much was read before."""
        self.chunks.extend(later.chunks)
        size = self.size + later.size
        return PendingFeatures(self.asked, later.d_sae, self.chunks, size)

    def make(self) -> ReadFeatures:
        """The records of the sites at which some token was read."""
        found: ReadFeatures = {}
        many = len(self.chunks) > MANY_CHUNKS
        chunks = joined(self.chunks) if many else self.chunks
        for at, read in enumerate(self.asked.reads):
            records = self._records(at, read, chunks)
            if records:
                found.setdefault(read.module, {})[read.site] = join(records)
        return found

    def _records(
        self, at: int, read: SiteRead, chunks: Sequence[Chunk]
    ) -> list[SAEFeatures]:
        parts = [(c.first, rows) for c in chunks if (rows := c.rows[at]) is not None]
        records = []
        # One width at a time: it depends on the batch of a step.
        for _, same in itertools.groupby(parts, key=lambda part: part[1].shape[1]):
            positions, rows = _in_one(list(same))
            was_read = rows[:, 0] != NOT_READ
            if not was_read.all():
                positions, rows = positions[was_read], rows[was_read]
            if len(rows):
                records.append(to_record(read, positions, rows, self.d_sae[at]))
        return records


def _in_one(parts: list[tuple[int, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Positions and rows of pieces that have a first position and rows."""
    positions: list[np.ndarray] = [
        np.arange(first, first + len(rows), dtype=np.int32) for first, rows in parts
    ]
    if len(parts) == 1:
        return positions[0], parts[0][1]
    return np.concatenate(positions), np.concatenate([rows for _, rows in parts])


class Readings:
    """What one request has read.

    Args:
        extra_args: of the request, with the canonical specs.
        num_prompt: tokens of its prompt.
        reader: its place in the log of the engine's steps.
    """

    def __init__(self, extra_args: JsonView, num_prompt: int, reader: LogReader):
        self.asked = AskedReads(extra_args)
        self.num_prompt = num_prompt
        self._reader = reader
        self._end = 0  # positions before this one are in the lists below
        self._prompt: list[Chunk] = []
        self._output: list[Chunk] = []

    @property
    def log(self) -> ReadLog:
        """Where the engine's steps are."""
        return self._reader.log

    def advance(self, num_generated: int, fired: bool) -> None:
        """Note that the request has `num_generated` tokens now.

        The last one has not been read yet, unless it is the one on which a stop
        condition held. Rows of later tokens do not count: the scheduler dropped those
        tokens, or a stop cut them off.
        """
        self._reader.pull()
        limit = self.num_prompt + num_generated - (0 if fired else 1)
        chunks, self._reader.chunks = self._reader.chunks, []
        split = self.num_prompt
        for chunk in chunks:
            if chunk.first < split:
                part = chunk.between(self._end, min(limit, split))
                if part is not None:
                    self._prompt.append(part)
            if chunk.end > split:
                part = chunk.between(max(self._end, split), limit)
                if part is not None:
                    self._output.append(part)
            if chunk.end > limit and (rest := chunk.between(limit, chunk.end)):
                self._reader.chunks.append(rest)
        self._end = max(self._end, limit)

    def take_output(self, delta: bool) -> PendingFeatures:
        """Rows of generated tokens: all, or with `delta` those not taken yet."""
        return self._take(self._output, delta)

    def take_prompt(self, delta: bool) -> PendingFeatures:
        """Rows of the prompt's tokens, likewise."""
        return self._take(self._prompt, delta)

    def _take(self, kept: list[Chunk], delta: bool) -> PendingFeatures:
        if len(kept) > MANY_CHUNKS:
            kept[:] = joined(kept)
        size = sum(chunk.size for chunk in kept) if delta else 0
        found = PendingFeatures(self.asked, self._reader.d_sae, list(kept), size)
        if delta:
            kept.clear()
        return found


def canonical_reads(specs: Sequence[JsonView]) -> tuple[SiteRead, ...]:
    """The reads of canonical specs, in the order in which the engine has them."""
    found = [
        SiteRead(
            spec["module_name"],
            HookPoint(hook),
            layer,
            spec["top_k"] or 0,
            tuple(spec["features"] or ()),
            tuple((s["feature_idx"], s["above"]) for s in spec["stop_if"] or ()),
            spec["phase"],
        )
        for spec in specs
        for hook, layers in spec["sites"].items()
        for layer in layers
    ]
    return tuple(sorted(found, key=lambda read: read.order))
