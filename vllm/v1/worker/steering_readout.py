# SPDX-License-Identifier: Apache-2.0
"""One worker's reading: rows of the requests that read, the step's index, its output.

Reading has rows, an index and tables as the three tiers have, and beside them an
output: after a forward, `take_step` starts the copy of what the sites have written. No
one waits for it: it is complete when the sampled tokens are on the host.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from vllm.config.sae_features import NOT_READ
from vllm.config.sae_readout_specs import SiteRead, read_key
from vllm.config.sae_readout_step import StepReadout
from vllm.model_executor.layers.steering_read_state import TABLE_HEAD, ReadBuffers
from vllm.model_executor.layers.steering_state import StepState
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.steering_index import BatchView, RequestRows, StepIndex
from vllm.v1.worker.steering_manager import RowManager
from vllm.v1.worker.steering_tables import upload_rows


class ReadRowManager(RowManager):
    """Rows of reading requests; what they read is kept beside."""


class Places(Protocol):
    """Where a worker's slots are; see `SiteModules`."""

    def read_buffers(self) -> Mapping[int, ReadBuffers]:
        """Buffers of every slot of this rank that can be read, by slot."""

    def read_slot(self, read: SiteRead) -> int | None:
        """The slot that holds what is read, or None if not on this rank."""


@dataclass(frozen=True)
class Readers:
    """Who reads in a batch, and where: what steps of the same batch share.

    Attributes:
        req_ids: the reading requests, in batch order; the arrays go with them.
        places: int64 `[n]`, their places in the batch.
        num_tokens: int64 `[n]`, their tokens in the step.
        first_rows: int64 `[n]`, each one's first token within `part`.
        part: of the step's tokens, from the first to the last that may be read.
        total: tokens of all.
    """

    req_ids: list[str]
    places: np.ndarray
    num_tokens: np.ndarray
    first_rows: np.ndarray
    part: slice
    total: int


@dataclass(frozen=True)
class SlotRead:
    """What one slot gives in steps of the same batch; the tensors are views.

    Attributes:
        slot: the engine's slot.
        rows: int32 `[part, width]`, what is read.
        marks: int32 `[part]`, its first column: `NOT_READ` until a token is read.
    """

    slot: int
    rows: torch.Tensor
    marks: torch.Tensor


def readers_of(view: BatchView, reading: Collection[str]) -> Readers:
    """The requests of a batch that are in `reading`; at least one is."""
    found = [at for at, req_id in enumerate(view.req_ids) if req_id in reading]
    places = np.array(found, dtype=np.int64)
    counts: np.ndarray = view.num_scheduled[: len(view.req_ids)].astype(np.int64)
    own, firsts = counts[places], (np.cumsum(counts) - counts)[places]
    part = slice(int(firsts[0]), int(firsts[-1] + own[-1]))
    req_ids = [view.req_ids[at] for at in found]
    return Readers(req_ids, places, own, firsts - part.start, part, int(own.sum()))


class SteeringReadout:
    """The reading state of one worker.

    Args:
        places: the worker's slots.
        step: the worker's step state.
        num_rows: rows of the slots' tables.
        sends: whether this rank's output goes to the scheduler.
    """

    def __init__(self, places: Places, step: StepState, num_rows: int, sends: bool):
        self.places = places
        self.step = step
        self.sends = sends
        self.manager = ReadRowManager(num_rows)
        self._rows: dict[str, RequestRows] = {}
        self._reads: dict[int, tuple[SiteRead, ...]] = {}  # by row
        # By slot: the active rows of its table, and the width of each one's output.
        self._tables: dict[int, dict[int, int]] = {}
        self._index = StepIndex(1)
        self._host: np.ndarray = np.zeros(step.max_tokens, dtype=np.int32)
        self._written = 0
        # Of the step at hand: who reads, and where; kept while a batch only decodes.
        self._reading = False
        self._readers: Readers | None = None
        self._computed: np.ndarray = np.zeros(0, dtype=np.int64)
        self._slot_reads: list[SlotRead] = []
        # Tokens that had a row since the worker started, by slot.
        self.tokens_read: dict[int, int] = {}

    @property
    def reading(self) -> bool:
        """Whether some token of the step is read."""
        return self._reading

    def resume_request(self, req_id: str, reads: tuple[SiteRead, ...]) -> None:
        """Take the rows of a request that enters the batch."""
        if not reads:
            return
        rows = RequestRows.of_phases(
            self._acquire(reads, "prefill"), self._acquire(reads, "decode")
        )
        self._rows[req_id] = rows
        self._index.hold(req_id, rows)

    def _acquire(self, reads: tuple[SiteRead, ...], phase: str) -> tuple[int]:
        key = read_key(reads, phase)
        if key is None:
            return (0,)
        row = self.manager.acquire(key, ())
        self._reads[row] = tuple(read for read in reads if read.reads(phase))
        return (row,)

    def park_request(self, req_id: str) -> None:
        """Give back the rows of a request that leaves the batch."""
        rows = self._rows.pop(req_id, None)
        if rows is None:
            return
        self._index.drop(req_id)
        for row in rows.held:
            self.manager.release(row)

    def prepare_step(self, view: BatchView) -> bool:
        """Write the index and the rows of a step; whether any token is read."""
        if not self._rows:
            self.clear_step()
            return False
        changed = self._index.update(view)
        rows = self._index.rows
        if rows is None:
            self.clear_step()
            return False
        self._write_tables()
        if changed or not self._written:
            self._write_index(rows[0])
            self._readers = readers_of(view, self._rows)
            self._slot_reads = self._find_slot_reads(rows[0], self._readers.part)
        assert self._readers is not None
        self._computed = view.num_computed[self._readers.places].astype(np.int64)
        self._set_reading(True)
        return True

    def clear_step(self) -> None:
        """No token is read: an ordinary step, a dummy run or a capture."""
        self._set_reading(False)
        if self._written:
            self.step.read_index.zero_()
            self._host[: self._written] = 0
            self._written = 0

    def _set_reading(self, reading: bool) -> None:
        self._reading = reading
        if self.step.reading != reading:
            # Setting an attribute of a PyTorch module is slow.
            self.step.reading = reading

    def _write_tables(self) -> None:
        changes = self.manager.take_changes()
        if not changes:
            return
        buffers = self.places.read_buffers()
        # A slot that was read may be gone with its module.
        for at in self._tables.keys() - buffers.keys():
            del self._tables[at]
        pending: dict[int, dict[int, np.ndarray]] = {}
        for row in changes:
            for at, widths in self._tables.items():
                if widths.pop(row, None) is not None:
                    # What the row's last holder read here must not stay.
                    pending.setdefault(at, {})[row] = encode_row(None, buffers[at])
            for read in self._reads[row]:
                slot = self.places.read_slot(read)
                if slot is not None:
                    self._tables.setdefault(slot, {})[row] = read.width
                    packed = encode_row(read, buffers[slot])
                    pending.setdefault(slot, {})[row] = packed
        for at, rows in pending.items():
            upload_rows(buffers[at].packed, list(rows), np.stack(list(rows.values())))

    def _write_index(self, rows: np.ndarray) -> None:
        tokens = len(rows)
        extent = max(tokens, self._written)
        self._host[:tokens] = rows
        self._host[tokens:extent] = 0
        device = self.step.read_index.device
        fresh = async_tensor_h2d(self._host[:extent].copy(), device=device)
        self.step.read_index[:extent].copy_(fresh)
        self._written = tokens

    def _find_slot_reads(self, rows: np.ndarray, part: slice) -> list[SlotRead]:
        """The slots that these rows read, each as wide as the widest one."""
        used = np.flatnonzero(np.bincount(rows)).tolist()
        buffers = self.places.read_buffers()
        found = []
        for at, table in self._tables.items():
            widths = [table[row] for row in used if row in table]
            if widths:
                out = buffers[at].out[part]
                found.append(SlotRead(at, out[:, : max(widths)], out[:, 0]))
        return found

    def take_step(self) -> StepReadout | None:
        """Start the copy of what the step's sites have written, in stream order."""
        if not (self._reading and self._slot_reads):
            return None
        self._reading = False
        readers = self._readers
        assert readers is not None
        rows: dict[int, np.ndarray] = {}
        for read in self._slot_reads:
            if self.sends:
                # Pinned memory of PyTorch's pool, which knows when a copy is done; the
                # next step may begin before this one has been looked at.
                copy = read.rows.to("cpu", non_blocking=True, copy=True)
                rows[read.slot] = copy.numpy()
                read_before = self.tokens_read.get(read.slot, 0)
                self.tokens_read[read.slot] = read_before + readers.total
            # Tokens of the next step count as not read until they are.
            read.marks.fill_(NOT_READ)
        if not rows:
            return None
        return StepReadout(
            readers.req_ids,
            readers.first_rows,
            readers.num_tokens,
            self._computed,
            rows,
        )

    def check_integrity(self) -> None:
        """Assert that the manager, the index and the requests agree."""
        self.manager.check_integrity()
        held = {row for rows in self._rows.values() for row in rows.held}
        assert self.manager.rows_in_use == len(held - {0}), "reading rows leaked"
        assert self._index.holders == set(self._rows), "the reading index disagrees"


def encode_row(read: SiteRead | None, buffers: ReadBuffers) -> np.ndarray:
    """int32 table row of what `read` asks, or an empty row if it is None."""
    row = np.zeros(buffers.packed.shape[1], dtype=np.int32)
    if read is not None:
        row[0], row[2], row[3] = 1, read.top_k, len(read.explicit)
        row[TABLE_HEAD : TABLE_HEAD + len(read.explicit)] = read.explicit
    return row
