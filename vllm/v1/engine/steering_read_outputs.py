# SPDX-License-Identifier: Apache-2.0
"""The front end's side of reading: from rows to what clients get."""

from __future__ import annotations

import itertools

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
from vllm.config.steering import HookPoint
from vllm.config.steering_json import JsonView
from vllm.v1.engine.steering_read_log import Chunk, LogReader


class Readings:
    """What one request has read.

    Args:
        extra_args: of the request, with the canonical specs.
        num_prompt: tokens of its prompt.
        reader: its place in the log of the engine's steps.
    """

    def __init__(self, extra_args: JsonView, num_prompt: int, reader: LogReader):
        self.reads = canonical_reads(extra_args)
        self.num_prompt = num_prompt
        self._reader = reader
        self._end = 0  # positions before this one are in the records
        self._prompt: list[list[SAEFeatures]] = [[] for _ in self.reads]
        self._output: list[list[SAEFeatures]] = [[] for _ in self.reads]

    def advance(self, num_generated: int, fired: bool) -> None:
        """Note that the request has `num_generated` tokens now.

        The last one has not been read yet, unless it is the one on which a stop
        condition held. Rows of later tokens do not count: the scheduler dropped those
        tokens, or a stop cut them off.
        """
        self._reader.pull()
        limit = self.num_prompt + num_generated - (0 if fired else 1)
        chunks, self._reader.chunks = self._reader.chunks, []
        due: list[Chunk] = []
        for chunk in chunks:
            if (part := chunk.between(self._end, limit)) is not None:
                due.append(part)
            if (rest := chunk.between(limit, chunk.end)) is not None:
                self._reader.chunks.append(rest)
        self._end = max(self._end, limit)
        for at in range(len(self.reads)) if due else ():
            parts = [(c.first, rows) for c in due if (rows := c.rows[at]) is not None]
            # Handle rows of one width at a time, because the width depends on a step's
            # batch.
            for _, same in itertools.groupby(parts, key=lambda part: part[1].shape[1]):
                self._add_rows(at, list(same))

    def _add_rows(self, at: int, parts: list[tuple[int, np.ndarray]]) -> None:
        rows = np.concatenate([found for _, found in parts])
        counts = [len(found) for _, found in parts]
        ends = np.cumsum(counts)
        starts = np.array([first for first, _ in parts]) - (ends - counts)
        positions = np.repeat(starts, counts) + np.arange(len(rows))
        was_read = rows[:, 0] != NOT_READ
        if not was_read.all():
            positions, rows = positions[was_read], rows[was_read]
        split = int(np.searchsorted(positions, self.num_prompt))
        for part, records in (
            (slice(None, split), self._prompt),
            (slice(split, None), self._output),
        ):
            if len(positions[part]):
                read, d_sae = self.reads[at], self._reader.d_sae[at]
                record = to_record(read, positions[part], rows[part], d_sae)
                records[at].append(record)

    def take_output(self, delta: bool) -> ReadFeatures:
        """Records of generated tokens: all, or with `delta` those not taken yet."""
        return self._take(self._output, delta)

    def take_prompt(self, delta: bool) -> ReadFeatures:
        """Records of the prompt's tokens, likewise."""
        return self._take(self._prompt, delta)

    def _take(self, kept: list[list[SAEFeatures]], delta: bool) -> ReadFeatures:
        found: ReadFeatures = {}
        for read, records in zip(self.reads, kept, strict=True):
            if not records:
                continue
            record = join(records)
            records[:] = [] if delta else [record]
            found.setdefault(read.module, {})[read.site] = record
        return found


def canonical_reads(extra_args: JsonView) -> tuple[SiteRead, ...]:
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
        for spec in extra_args.get(READOUT_KEY) or ()
        for hook, layers in spec["sites"].items()
        for layer in layers
    ]
    return tuple(sorted(found, key=lambda read: read.order))
