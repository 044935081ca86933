# SPDX-License-Identifier: Apache-2.0
"""One worker's steering: its sites, rows and per-step index.

The model runner owns one `SteeringRuntime` and calls its methods. The runtime owns
every tensor. It is the same for both runners.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

import numpy as np
import torch
from torch import nn

from vllm.config.sae_steering_admission import admitted_prompt_length
from vllm.config.sae_steering_spans import When
from vllm.config.sae_steering_types import SteeringRequest, parse_steering_request
from vllm.config.steering import PointWidths, SteeringConfig, Tier
from vllm.config.steering_slots import start_up_slots
from vllm.exceptions import VLLMValidationError
from vllm.logger import init_logger
from vllm.sampling_params import SamplingParams
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.sae_clamp_manager import SAEClampManager
from vllm.v1.worker.sae_full_reconstruction_manager import SAEFullReconstructionManager
from vllm.v1.worker.steering_build import build_site_modules
from vllm.v1.worker.steering_counts import TokenCounts
from vllm.v1.worker.steering_embeds import known_token_ids
from vllm.v1.worker.steering_index import (
    NO_STOP,
    BatchView,
    RequestRows,
    StepIndex,
)
from vllm.v1.worker.steering_manager import RowManager, SteeringVectorManager
from vllm.v1.worker.steering_modules import SiteModules
from vllm.v1.worker.steering_readout import SteeringReadout
from vllm.v1.worker.steering_tables import write_rows

logger = init_logger(__name__)


class SteeringRuntime:
    """The steering state of one worker.

    Args:
        config: the engine's resolved steering configuration.
        model: the loaded model; its layers get the sites attached.
        max_num_seqs: requests that can be in a batch.
        max_tokens: tokens that a forward can have, padding included.
        dtype, device: of the model's activations.
        vocab_size: bound of token ids, for the skip sets.
        widths: of the points of the model's layers.
        sends_output: whether this rank's output goes to the scheduler.
    """

    def __init__(
        self,
        config: SteeringConfig,
        model: nn.Module,
        *,
        max_num_seqs: int,
        max_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        vocab_size: int,
        widths: PointWidths,
        sends_output: bool = True,
    ):
        if not config.slots:
            config = start_up_slots(config)
        config = config.for_workers()
        self.config = config
        num_rows = config.max_pieces * max_num_seqs + 1
        self.managers: dict[Tier, RowManager] = {
            Tier.ADDITIVE: SteeringVectorManager(num_rows),
            Tier.DELTA: SAEClampManager(num_rows),
            Tier.FULL: SAEFullReconstructionManager(num_rows),
        }
        self.modules: SiteModules = build_site_modules(
            config, model, num_rows, max_tokens, dtype, device, vocab_size, widths
        )
        self.step = self.modules.step
        self.readout = SteeringReadout(self.modules, self.step, num_rows, sends_output)
        # Specs of every request that the worker knows; rows of those in the batch.
        self._requests: dict[str, SteeringRequest] = {}
        self._rows: dict[str, RequestRows] = {}
        # Of these, requests that edit; the others only read.
        self._editing: set[str] = set()
        # Of these with spans, the prompt's length.
        self._prompt_len: dict[str, int] = {}
        # Of these, prompts with positions that have no token id.
        self._embedded: dict[str, np.ndarray] = {}
        self._step_index = StepIndex(len(Tier))
        shape = (len(Tier), max_tokens)
        self._index_host: np.ndarray = np.zeros(shape, dtype=np.int32)
        self._written_tokens = 0
        self.counts = TokenCounts(num_rows)
        # int64 [tier, phase]: tokens that had a row, since the worker started.
        self.steered_tokens: np.ndarray = np.zeros((len(Tier), 2), dtype=np.int64)

    @property
    def parked(self) -> list[str]:
        """Steered requests that hold no rows: preempted, or not in the batch."""
        return [req_id for req_id in self._requests if req_id not in self._rows]

    @property
    def holding(self) -> list[str]:
        """Requests that hold rows."""
        return list(self._rows)

    def add_request(
        self,
        req_id: str,
        params: SamplingParams | None,
        embedded: np.ndarray | None = None,
    ) -> None:
        """Take the rows of a request that enters the batch for the first time.

        `embedded` is what `embedded_positions` says of its prompt.
        """
        self.remove_request(req_id)
        request = self._parse(req_id, params)
        if request is None:
            return
        self._requests[req_id] = request
        if request.has_spans:
            assert params is not None and params.extra_args is not None
            self._prompt_len[req_id] = admitted_prompt_length(params.extra_args)
        if embedded is not None:
            self._embedded[req_id] = embedded
        self.resume_request(req_id)

    def _parse(
        self, req_id: str, params: SamplingParams | None
    ) -> SteeringRequest | None:
        if params is None or not params.extra_args:
            return None
        try:
            return parse_steering_request(params.extra_args, self.config)
        except (ValueError, VLLMValidationError):
            # The engine admits a request only after this same check. A failure here is
            # a defect of ours, not a client's error, and the worker must survive it.
            logger.exception("steering: request %s was admitted unparsable", req_id)
            return None

    def resume_request(self, req_id: str) -> None:
        """Take the rows of a request that comes back into the batch."""
        request = self._requests[req_id]
        self.modules.inline.acquire(request)
        if request.has_spans:
            rows = self._scheduled_rows(request, self._prompt_len[req_id])
        else:
            rows = RequestRows(
                prefill=self._acquire(request, "prefill"),
                decode=self._acquire(request, "decode"),
            )
        self._rows[req_id] = rows
        self._step_index.hold(req_id, rows)
        if any(row for tier in Tier for row in rows.held(tier)):
            self._editing.add(req_id)
        self.readout.resume_request(req_id, request.reads)

    def _scheduled_rows(self, request: SteeringRequest, prompt_len: int) -> RequestRows:
        """The rows of a request with spans."""
        schedule = []
        for piece in request.schedule(prompt_len):
            stop = NO_STOP if piece.stop is None else piece.stop - prompt_len
            schedule.append((stop, self._acquire(request, piece.when)))
        nothing = (0,) * len(Tier)
        return RequestRows(nothing, nothing, tuple(schedule))

    def _acquire(self, request: SteeringRequest, when: When) -> tuple[int, ...]:
        rows = [0] * len(Tier)
        for tier, manager in self.managers.items():
            key = request.row_key(tier, when)
            if key is not None:
                rows[tier] = manager.acquire(key, request.edits(tier, when))
        return tuple(rows)

    def park_request(self, req_id: str) -> None:
        """Give back the rows of a request that leaves the batch but may return."""
        held = self._rows.pop(req_id, None)
        if held is None:
            return
        self._step_index.drop(req_id)
        self._editing.discard(req_id)
        self.readout.park_request(req_id)
        self.modules.inline.release(self._requests[req_id])
        for tier in Tier:
            for row in held.held(tier):
                if self.managers[tier].release(row):
                    self.counts.free(tier, row)

    def remove_request(self, req_id: str) -> None:
        """Forget a finished or aborted request; unknown ids are ignored."""
        self.park_request(req_id)
        self._requests.pop(req_id, None)
        self._prompt_len.pop(req_id, None)
        self._embedded.pop(req_id, None)

    def prepare_step(self, view: BatchView) -> None:
        """Write the index, the rows and the bypass flags of a step before its forward.
        What has not changed is not copied."""
        if not self._rows:
            self.clear_step()
            return
        bypasses = self._prepare_edits(view)
        reads = self.readout.prepare_step(view)
        backend = self.modules.backend
        if backend and (bypasses or reads):
            tokens = int(view.num_scheduled[: len(view.req_ids)].sum())
            backend.write_flags(known_token_ids(view, tokens, self._embedded))

    def _prepare_edits(self, view: BatchView) -> bool:
        """Write rows and index; returns whether a tier edits that bypasses tokens."""
        index = self._step_index
        changed = bool(self._editing) and index.update(view)
        if not self._editing or index.rows is None:
            self._clear_edits()
            return False
        self._write_rows()
        if changed or not self._written_tokens:
            self._write_index(index.rows)
        self.steered_tokens += index.steered
        self.counts.follow(index)
        return bool(index.steered[Tier.DELTA :].any())

    def clear_step(self) -> None:
        """Give every token row 0: for an unsteered step, a dummy run or a capture."""
        self.readout.clear_step()
        self._clear_edits()

    def _clear_edits(self) -> None:
        if self._written_tokens:
            self.step.index.zero_()
            self._index_host[:, : self._written_tokens] = 0
            self._written_tokens = 0

    def _write_rows(self) -> None:
        self.modules.inline.upload()
        for tier, manager in self.managers.items():
            if changes := manager.take_changes():
                self.counts.hold(tier, changes)
                tables = self.modules.tables(tier)
                write_rows(changes, tables, self.modules.table_of(tier))

    def _write_index(self, rows: np.ndarray) -> None:
        host, tokens = self._index_host, rows.shape[1]
        extent = max(tokens, self._written_tokens)
        unchanged = tokens == self._written_tokens and np.array_equal(
            host[:, :tokens], rows
        )
        if unchanged:
            return
        host[:, :tokens] = rows
        host[:, tokens:extent] = 0
        # A new pinned buffer each time. The copy is asynchronous, and the host may
        # prepare the next step before the copy has read the buffer.
        fresh = async_tensor_h2d(host[:, :extent], device=self.step.index.device)
        self.step.index[:, :extent].copy_(fresh)
        self._written_tokens = tokens

    def check_integrity(self, live: Collection[str] | None = None) -> None:
        """Assert that the managers and the requests agree on who holds what.

        `live` are the ids that the scheduler knows, including finished requests that it
        has not yet told the worker about. If the worker knows another request, it has
        failed to forget it.
        """
        if live is not None:
            forgotten = set(self._requests) - set(live)
            assert not forgotten, f"finished requests are still known: {forgotten}"
        for tier, manager in self.managers.items():
            manager.check_integrity()
            held = {
                row for rows in self._rows.values() for row in rows.held(tier) if row
            }
            assert manager.rows_in_use == len(held), f"{tier.name}: rows leaked"
        assert set(self._rows) <= set(self._requests), "rows of an unknown request"
        assert set(self._embedded) <= set(self._requests), "an unknown prompt"
        assert self._step_index.holders == set(self._rows), "the index disagrees"
        self.modules.inline.check_integrity(
            self._requests[req_id] for req_id in self._rows
        )
        self.readout.check_integrity()


class SteeredRunner(Protocol):
    """What module changes and measurements use of a model runner."""

    steering: SteeringRuntime | None

    def use_steering_graphs(self, used: bool) -> None: ...
