# SPDX-License-Identifier: Apache-2.0
"""The scheduler's side of reading, between the workers and the front ends.

The scheduler knows which tokens of a step were accepted, so it knows the positions of
a step's rows. It sends a step's rows to the front ends as they are, with the step's
outputs, and sees whether a stop condition holds. While the batch stays the same, a step
costs a few array operations, however many requests read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vllm.config.sae_features import NOT_READ, first_firing
from vllm.config.sae_readout_specs import SiteRead
from vllm.config.sae_readout_step import ReadPlaces, StepReadout
from vllm.config.steering import SteeringConfig
from vllm.v1.engine.steering_read_outbox import Outbox

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.request import Request

# The key under which the first output of a step carries steps to the front end.
PAYLOAD_KEY = "sae_readout"
STOP_PREFIX = "sae:"
# On a `Request`: its `RequestReads`; None where it reads nothing.
READS_ATTRIBUTE = "sae_reads"


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
        tokens: rows that were read, one for each token and site; twice if a token was
            computed twice.
        bytes: of the rows that went to a front end.
        stops: requests that a feature ended.
    """

    tokens: int = 0
    bytes: int = 0
    stops: int = 0


@dataclass(eq=False)
class RequestReads:
    """What one request reads.

    Attributes:
        reads: in canonical order.
        slots: the engine's slot of each of them.
        d_sae: the number of features at each of them.
        num_prompt: tokens of the prompt.
        min_tokens: generated tokens before which nothing ends the request.
        introduced: whether its front end knows `slots` and `d_sae`.
    """

    reads: tuple[SiteRead, ...]
    slots: tuple[int, ...]
    d_sae: tuple[int, ...]
    num_prompt: int
    min_tokens: int
    introduced: bool = False

    @property
    def stops(self) -> bool:
        """Whether a feature can end the request."""
        return any(read.stops for read in self.reads)

    def introduce(self) -> ReadPlaces:
        """What the front end must know; sent once."""
        self.introduced = True
        return self.slots, self.d_sae

    def fired(
        self, rows: Mapping[int, np.ndarray], first_row: int, start: int, count: int
    ) -> Fired | None:
        """The first stop condition that holds in a step, if any.

        Args:
            rows: of the step, by slot.
            first_row: the row of the request's first token.
            start: position of that token.
            count: how many of its tokens count.
        """
        # Generated tokens once the token itself is included.
        generated: np.ndarray = np.arange(count) + (start - self.num_prompt + 1)
        allowed = generated >= max(self.min_tokens, 1)
        fired: Fired | None = None
        for read, slot in zip(self.reads, self.slots, strict=True):
            if slot not in rows:
                continue
            own = rows[slot][first_row : first_row + count]
            found = first_firing(read, own, allowed)
            if found is None:
                continue
            position = start + found[0]
            if fired is None or position < fired.position:
                reason = f"{STOP_PREFIX}{read.module}:{read.site}:{found[1]}"
                fired = Fired(position, reason, read.module)
        return fired


class Conditions:
    """The stop conditions of a batch at one slot, as arrays over the conditions."""

    def __init__(self, found: Sequence[tuple[int, int, float]]):
        places, columns, bounds = zip(*found, strict=True)
        self.places = np.array(places, dtype=np.int64)
        self.columns = np.array(columns, dtype=np.int64)
        self.bounds = np.array(bounds, dtype=np.float32)

    def met(self, rows: np.ndarray, firsts: np.ndarray) -> set[int]:
        """Places of the requests whose first row meets a condition."""
        at = firsts[self.places]
        # If a step has no row wide enough, no request with a condition was read.
        there = (self.columns < rows.shape[1]) & (rows[at, 0] != NOT_READ)
        columns = np.minimum(self.columns, rows.shape[1] - 1)
        values = rows.view(np.float32)[at, columns]
        return set(self.places[there & (values > self.bounds)].tolist())


class Batch:
    """The reading requests of a step, looked up again only when they change."""

    def __init__(
        self,
        req_ids: list[str],
        requests: Mapping[str, Request],
        counts: dict[str, ReadCounts],
    ):
        self.req_ids = req_ids
        self.reads: list[RequestReads | None] = []
        self.clients: dict[int, list[int]] = {}
        # Of each slot, where the rows that requests read are counted.
        self.counts: dict[int, ReadCounts] = {}
        self.stopping: list[int] = []
        self.new: dict[str, ReadPlaces] = {}
        conditions: dict[int, list[tuple[int, int, float]]] = {}
        for at, req_id in enumerate(self.req_ids):
            request = requests.get(req_id)
            reads = None if request is None else request.sae_reads
            self.reads.append(reads)
            if request is None or reads is None:
                continue
            self.clients.setdefault(request.client_index, []).append(at)
            if not reads.introduced:
                self.new[req_id] = reads.introduce()
            if reads.stops:
                self.stopping.append(at)
            for read, slot in zip(reads.reads, reads.slots, strict=True):
                if slot not in self.counts:
                    self.counts[slot] = counts.setdefault(read.module, ReadCounts())
                for feature, bound in read.stops:
                    column = 2 + read.explicit.index(feature)
                    conditions.setdefault(slot, []).append((at, column, bound))
        self.conditions = {slot: Conditions(own) for slot, own in conditions.items()}

    def take_new(self) -> dict[str, ReadPlaces]:
        """Requests that the front ends do not know yet."""
        new, self.new = self.new, {}
        return new

    def fired(
        self,
        rows: Mapping[int, np.ndarray],
        firsts: np.ndarray,
        starts: np.ndarray,
        counts: np.ndarray,
    ) -> dict[str, Fired]:
        """The requests for which a stop condition holds.

        Args:
            rows: of the step, by slot.
            firsts: `[n]`, the row of each request's first token.
            starts: `[n]`, the position of that token.
            counts: `[n]`, how many of its tokens count.
        """
        candidates = self.stopping
        if candidates and (counts == 1).all():
            met: set[int] = set()
            for slot, own in self.conditions.items():
                if slot in rows:
                    met |= own.met(rows[slot], firsts)
            candidates = sorted(met)
        fired: dict[str, Fired] = {}
        for at in candidates:
            reads = self.reads[at]
            assert reads is not None
            span = int(firsts[at]), int(starts[at]), int(counts[at])
            found = reads.fired(rows, *span)
            if found is not None:
                fired[self.req_ids[at]] = found
        return fired


class StepReads:
    """Holds what the steps of one engine have read, until its front ends get it.

    Attributes:
        counts: by module, since the engine started.
    """

    def __init__(self) -> None:
        self.counts: dict[str, ReadCounts] = {}
        self.outbox = Outbox()
        self._batch: Batch | None = None

    def batch(self, req_ids: list[str], requests: Mapping[str, Request]) -> Batch:
        """The batch of a step."""
        if self._batch is None or self._batch.req_ids != req_ids:
            self._batch = Batch(req_ids, requests, self.counts)
        return self._batch

    def take(
        self,
        readout: StepReadout,
        starts: np.ndarray,
        counts: np.ndarray,
        requests: Mapping[str, Request],
    ) -> dict[str, Fired]:
        """Keep a step for the front ends; returns the requests that a feature may end.

        Args:
            readout: of the step.
            starts: int64 `[n]`, position of each request's first token.
            counts: int64 `[n]`, how many of its tokens count.
            requests: that the scheduler knows, by id.
        """
        batch = self.batch(readout.req_ids, requests)
        for slot, rows in readout.rows.items():
            if slot in batch.counts:
                own = batch.counts[slot]
                own.tokens += int(np.count_nonzero(rows[:, 0] != NOT_READ))
                own.bytes += rows.nbytes
        new = batch.take_new()
        self.outbox.put(batch, readout, starts, counts, batch.clients, new)
        self.outbox.drop_ended(requests.keys())
        if not batch.stopping:
            return {}
        return batch.fired(readout.rows, readout.first_rows, starts, counts)

    def stopped(self, fired: Fired) -> None:
        """Count a request that a condition has ended."""
        self.counts.setdefault(fired.module, ReadCounts()).stops += 1

    def attach(self, outputs: Mapping[int, EngineCoreOutputs]) -> None:
        """Put the waiting steps into the first output of each client."""
        for client, of_client in outputs.items():
            if not of_client.outputs:
                continue
            steps = self.outbox.take(client)
            if steps:
                first = of_client.outputs[0]
                params = first.ec_transfer_params or {}
                first.ec_transfer_params = {**params, PAYLOAD_KEY: steps}


def request_reads(
    request: Request, reads: tuple[SiteRead, ...], config: SteeringConfig | None
) -> RequestReads | None:
    """The scheduler's state of an admitted request, or None if it reads nothing."""
    if config is None or not reads:
        return None
    params = request.sampling_params
    assert params is not None
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
