# SPDX-License-Identifier: Apache-2.0
"""From what workers have read to what clients get: the scheduler's side.

The scheduler knows which tokens of a step were accepted, so it knows the positions of
a step's rows. It keeps the rows of a prompt until the request has its first output,
drops positions that were read before (they are recomputed after preemption), and sees
whether a stop condition holds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from vllm.config.sae_features import NOT_READ, first_firing
from vllm.config.sae_readout_specs import SiteRead
from vllm.config.sae_readout_step import StepReadout
from vllm.config.sae_steering_parser import parse_steering_request
from vllm.config.steering import SteeringConfig
from vllm.config.steering_json import JsonView
from vllm.sampling_params import RequestOutputKind

if TYPE_CHECKING:
    from vllm.v1.request import Request

# Where an engine's output carries the rows of a request to the front end.
PAYLOAD_KEY = "sae_readout"
STOP_PREFIX = "sae:"
# On a `Request`: its `RequestReads`; None where it reads nothing.
READS_ATTRIBUTE = "sae_reads"

# (position of the first row, for each read its rows' width and bytes, or None).
Chunk = tuple[int, list[tuple[int, bytes] | None]]
# `d_sae` of each read, and the chunks in order; plain types, for msgpack.
Payload = tuple[tuple[int, ...], list[Chunk]]


@dataclass(frozen=True)
class Fired:
    """A stop condition that holds: the token's position, stop reason and module."""

    position: int
    reason: str
    module: str


@dataclass
class ReadCounts:
    """What requests have read of one module since the engine started.

    Attributes:
        tokens: rows that were read, one for each token and site.
        bytes: of rows that went to the front end.
        stops: requests that a feature ended.
    """

    tokens: int = 0
    bytes: int = 0
    stops: int = 0


class SlotRows:
    """The rows of one slot in a step, ready to be cut for its requests.

    Whatever has to look at numbers does so once for all requests.
    """

    def __init__(self, rows: np.ndarray):
        self.rows = rows
        self.width = rows.shape[1]
        self._data = rows.tobytes()
        self._row_bytes = 4 * self.width
        read = np.cumsum(rows[:, 0] != NOT_READ)
        self._read: list[int] = [0, *read.tolist()]

    def count(self, first: int, end: int) -> int:
        """How many of some rows were read."""
        return self._read[end] - self._read[first]

    def cut(self, first: int, end: int) -> bytes:
        """The bytes of some rows."""
        return self._data[first * self._row_bytes : end * self._row_bytes]


class StepRows:
    """What a step has read, by slot."""

    def __init__(self, readout: StepReadout):
        self.first_row = readout.first_row
        self.slots = {at: SlotRows(rows) for at, rows in readout.rows.items()}


@dataclass
class RequestReads:
    """What one request reads, and what of it has not been sent yet.

    Attributes:
        reads: in canonical order.
        slots: the engine's slot of each of them.
        d_sae: the number of features at each of them.
        num_prompt: tokens of the prompt.
        min_tokens: generated tokens before which nothing ends the request.
        counts: of the engine, by module.
        waits: nobody looks before the request ends, so nothing is sent before.
        next_position: the first position that has not been read.
    """

    reads: tuple[SiteRead, ...]
    slots: tuple[int, ...]
    d_sae: tuple[int, ...]
    num_prompt: int
    min_tokens: int
    counts: dict[str, ReadCounts]
    waits: bool = False
    next_position: int = 0
    chunks: list[Chunk] = field(default_factory=list)

    def take(
        self, step: StepRows, first_row: int, start: int, accepted: int
    ) -> Fired | None:
        """Keep the new rows of a step; the first stop condition that holds, if any.

        Args:
            step: what the step has read.
            first_row: place of the request's first token among the step's tokens.
            start: position of that token.
            accepted: how many of its tokens count; the rest were rejected drafts.
        """
        first = max(self.next_position, start)
        end = start + accepted
        if end <= first:
            return None
        self.next_position = end
        offset = first_row - step.first_row - start
        low, high = offset + first, offset + end
        kept: list[tuple[int, bytes] | None] = []
        fired: Fired | None = None
        empty = True
        for read, slot in zip(self.reads, self.slots, strict=True):
            rows = step.slots.get(slot)
            count = 0 if rows is None else rows.count(low, high)
            if rows is None or not count:
                kept.append(None)
                continue
            data = rows.cut(low, high)
            kept.append((rows.width, data))
            empty = False
            counts = self.counts.setdefault(read.module, ReadCounts())
            counts.tokens += count
            counts.bytes += len(data)
            if read.stops:
                fired = self._sooner(fired, read, rows.rows[low:high], first)
        if not empty:
            self.chunks.append((first, kept))
        if fired is not None:
            self.counts[fired.module].stops += 1
        return fired

    def _sooner(
        self,
        fired: Fired | None,
        read: SiteRead,
        rows: np.ndarray,
        first: int,
    ) -> Fired | None:
        # Generated tokens once the token itself is included.
        generated: np.ndarray = np.arange(len(rows)) + (first - self.num_prompt + 1)
        found = first_firing(read, rows, generated >= max(self.min_tokens, 1))
        if found is None:
            return fired
        row, feature = found
        position = first + row
        if fired is not None and fired.position <= position:
            return fired
        reason = f"{STOP_PREFIX}{read.module}:{read.site}:{feature}"
        return Fired(position, reason, read.module)

    def payload(self) -> Payload | None:
        """What has not been sent yet, for `Readings.add`; None: nothing."""
        if not self.chunks:
            return None
        chunks, self.chunks = self.chunks, []
        return self.d_sae, chunks


def reads_of(
    extra_args: JsonView | None, config: SteeringConfig | None
) -> tuple[SiteRead, ...]:
    """What a request with these `extra_args` reads."""
    request = parse_steering_request(extra_args, config)
    return () if request is None else request.reads


def request_reads(
    request: Request, config: SteeringConfig | None, counts: dict[str, ReadCounts]
) -> RequestReads | None:
    """The scheduler's state of an admitted request; None: it reads nothing.

    Args:
        counts: of the engine, by module; the request adds to them.
    """
    params = request.sampling_params
    assert params is not None
    reads = reads_of(params.extra_args, config)
    if config is None or not reads:
        return None
    modules = [config.modules[read.module] for read in reads]
    slots, d_sae = [], []
    for module, read in zip(modules, reads, strict=True):
        slot = module.slot_at(read.hook, read.layer)
        site = module.site(read.hook, read.layer)
        assert slot is not None and site is not None, "a read site has no slot"
        slots.append(slot)
        d_sae.append(site.d_sae)
    return RequestReads(
        reads,
        tuple(slots),
        tuple(d_sae),
        request.num_prompt_tokens,
        params.min_tokens,
        counts,
        # Stop strings are found by the front end, which then has its last output. A
        # step in which nobody reads sends nothing, so the last one must be read.
        waits=params.output_kind is RequestOutputKind.FINAL_ONLY
        and not params.stop
        and any(read.reads("decode") for read in reads),
    )


def step_start(
    num_tokens: int, own: int, computed: int, num_drafts: int, num_generated: int
) -> tuple[int, int]:
    """(position of a request's first token in a step, how many tokens count).

    A step that generates ends with the last known token and the drafts after it; of
    those, as many count as were accepted. Another step is a part of a prompt, whose
    place the worker knows.

    Args:
        num_tokens: of the request, before the step's own are appended.
        own: its tokens in the step, drafts included.
        computed: position of the first of them, as the worker knows it.
        num_drafts: draft tokens among them.
        num_generated: tokens that the step has generated.
    """
    known = own - num_drafts
    if not num_generated:
        return computed, known
    return num_tokens - known, known + num_generated - 1
