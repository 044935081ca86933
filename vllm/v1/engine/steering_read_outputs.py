# SPDX-License-Identifier: Apache-2.0
"""From what workers have read to what clients get: the front end's side."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

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
from vllm.v1.engine.steering_reads import Chunk, Payload


class Readings:
    """What one request has read, as it arrives.

    Args:
        extra_args: of the request, with the canonical specs.
        num_prompt: tokens of its prompt.
    """

    def __init__(self, extra_args: JsonView, num_prompt: int):
        self.reads = canonical_reads(extra_args)
        self.num_prompt = num_prompt
        self._d_sae: Sequence[int] = ()
        self._pending: list[Chunk] = []
        self._prompt: list[list[SAEFeatures]] = [[] for _ in self.reads]
        self._output: list[list[SAEFeatures]] = [[] for _ in self.reads]

    def add(self, payload: Payload) -> None:
        """Take what an engine's output brings; it is looked at when it is asked for."""
        self._d_sae, chunks = payload
        self._pending += chunks

    def _read_pending(self) -> None:
        chunks, self._pending = self._pending, []
        for at in range(len(self.reads)) if chunks else ():
            own = ((first, kept[at]) for first, kept in chunks)
            parts = [(first, rows[0], rows[1]) for first, rows in own if rows]
            # Rows of one width at a time: it follows the batch that a step had.
            for width, same in itertools.groupby(parts, key=lambda part: part[1]):
                self._add_rows(at, width, [(first, data) for first, _, data in same])

    def _add_rows(self, at: int, width: int, parts: list[tuple[int, bytes]]) -> None:
        joined = b"".join(data for _, data in parts)
        rows = np.frombuffer(joined, dtype=np.int32).reshape(-1, width)
        counts = [len(data) // (4 * width) for _, data in parts]
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
                read, d_sae = self.reads[at], self._d_sae[at]
                record = to_record(read, positions[part], rows[part], d_sae)
                records[at].append(record)

    def finish(self, num_generated: int, fired: bool) -> None:
        """The request has ended with `num_generated` tokens.

        Tokens past a stop are dropped; the last one has no entry, unless it is the
        one on which a stop condition held.
        """
        self._read_pending()
        limit = self.num_prompt + num_generated - (0 if fired else 1)
        for records in self._output:
            while records and records[-1].positions[-1] >= limit:
                last = records.pop()
                keep = int(np.searchsorted(last.positions, limit))
                if keep:
                    records.append(last.head(keep))

    def take_output(self, delta: bool) -> ReadFeatures:
        """Entries of generated tokens: all, or with `delta` those not taken yet."""
        return self._take(self._output, delta)

    def take_prompt(self, delta: bool) -> ReadFeatures:
        """Entries of the prompt's tokens, likewise."""
        return self._take(self._prompt, delta)

    def _take(self, kept: list[list[SAEFeatures]], delta: bool) -> ReadFeatures:
        self._read_pending()
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
