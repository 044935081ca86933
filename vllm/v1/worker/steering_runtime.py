# SPDX-License-Identifier: Apache-2.0
"""One worker's steering: its sites, rows and per-step index.

The model runner owns one `SteeringRuntime` and calls its methods. The runtime owns
every tensor. It is the same for both runners.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import nn

from vllm.config.sae_steering_plan import SteeringPlan, decode_plan
from vllm.config.sae_steering_specs import PLAN_KEY
from vllm.config.steering import SteeringConfig, Tier
from vllm.config.steering_checks import shown
from vllm.logger import init_logger
from vllm.sampling_params import SamplingParams
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.sae_clamp_manager import SAEClampManager
from vllm.v1.worker.sae_full_reconstruction_manager import SAEFullReconstructionManager
from vllm.v1.worker.steering_build import build_site_modules
from vllm.v1.worker.steering_counts import TokenCounts
from vllm.v1.worker.steering_embeds import known_token_ids
from vllm.v1.worker.steering_idle_graphs import IdleGraphs
from vllm.v1.worker.steering_index import BatchView, RequestRows, StepIndex
from vllm.v1.worker.steering_manager import RowManager, SteeringVectorManager
from vllm.v1.worker.steering_readout import SteeringReadout
from vllm.v1.worker.steering_shape import SteeringShape
from vllm.v1.worker.steering_tables import write_rows

logger = init_logger(__name__)


class SteeringRuntime:
    """The steering state of one worker.

    Args:
        config: the engine's resolved steering configuration.
        model: the loaded model; its layers get the sites attached.
        shape: of the worker's buffers.
        sends_output: whether this rank's output goes to the scheduler.
        has_idle_graphs: whether CUDA graphs get twins for steps without steering.
    """

    def __init__(
        self,
        config: SteeringConfig,
        model: nn.Module,
        shape: SteeringShape,
        sends_output: bool,
        has_idle_graphs: bool = False,
    ):
        self.config = config.for_workers()
        num_rows = shape.num_rows
        self.managers: dict[Tier, RowManager] = {
            Tier.ADDITIVE: SteeringVectorManager(num_rows),
            Tier.DELTA: SAEClampManager(num_rows),
            Tier.FULL: SAEFullReconstructionManager(num_rows),
        }
        self.modules = build_site_modules(self.config, model, shape)
        self.step = self.modules.step
        self.readout = SteeringReadout(self.modules, self.step, num_rows, sends_output)
        # Plans of all requests that the worker knows; rows of those in the batch: of
        # each of the plan's rows, the one that it has in the tables.
        self._plans: dict[str, SteeringPlan] = {}
        self._rows: dict[str, list[int]] = {}
        # Of these, requests that edit; the others only read.
        self._editing: set[str] = set()
        # Of these, prompts with positions that have no token id.
        self._embedded: dict[str, np.ndarray] = {}
        # Requests whose plan this rank could not follow; other ranks may steer them.
        self._lost: set[str] = set()
        self._step_index = StepIndex(len(Tier))
        self._index_host: np.ndarray = np.zeros(
            (len(Tier), shape.max_tokens), dtype=np.int32
        )
        self._written_tokens = 0
        # What `_index_part` returned for this extent, by tier: a slice takes its time.
        self._part_extent = 0
        self._parts: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.counts = TokenCounts(num_rows)
        # Whether rows were taken, written or given back since the tables were marked.
        self._marks_are_old = True
        self.idle_graphs: IdleGraphs | None = None
        if has_idle_graphs:
            self.idle_graphs = IdleGraphs(self.step, lambda: self.is_idle)
        # int64 [tier, phase]: tokens that had a row, since the worker started.
        self.steered_tokens: np.ndarray = np.zeros((len(Tier), 2), dtype=np.int64)

    @property
    def parked(self) -> list[str]:
        """Steered requests that hold no rows: preempted, or not in the batch."""
        return [req_id for req_id in self._plans if req_id not in self._rows]

    @property
    def is_idle(self) -> bool:
        """Whether no token of the prepared step is edited or read.

        It follows from what the scheduler sends, so that all ranks of a tensor-parallel
        group agree: those that share SAEs run the same exchanges.
        """
        return not (self._written_tokens or self.step.reading or self._lost)

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
        plan = self._plan(req_id, params)
        if plan is None:
            return
        self._plans[req_id] = plan
        if embedded is not None:
            self._embedded[req_id] = embedded
        self.resume_request(req_id)

    def _plan(self, req_id: str, params: SamplingParams | None) -> SteeringPlan | None:
        data = ((params and params.extra_args) or {}).get(PLAN_KEY)
        if data is None:
            return None
        plan = decode_plan(data)
        if not all(name in self.config.modules for name in plan.modules):
            # The engine admits a request only while its modules are here. A failure is
            # a defect of ours, not a client's error, and the worker must survive it.
            text = "Steering: request %s names a module that is not here"
            logger.error(text, shown(req_id))
            self._lost.add(req_id)
            return None
        return plan

    def resume_request(self, req_id: str) -> None:
        """Take the rows of a request that comes back into the batch."""
        plan = self._plans[req_id]
        self.modules.inline.acquire(plan.vectors)
        managers = self.managers
        self._marks_are_old = True
        rows = [managers[row.tier].acquire(row.key, row.edits) for row in plan.rows]
        self._rows[req_id] = rows
        if rows:
            schedule = RequestRows.of_plan(plan, rows)
            self._step_index.hold(req_id, schedule)
            self._editing.add(req_id)
        self.readout.resume_request(req_id, plan.reads)

    def park_request(self, req_id: str) -> None:
        """Give back the rows of a request that leaves the batch but may return."""
        rows = self._rows.pop(req_id, None)
        if rows is None:
            return
        self._marks_are_old = True
        if rows:
            self._step_index.drop(req_id)
        self._editing.discard(req_id)
        self.readout.park_request(req_id)
        plan = self._plans[req_id]
        self.modules.inline.release(plan.vectors)
        for planned, row in zip(plan.rows, rows, strict=True):
            if self.managers[planned.tier].release(row):
                self.counts.free(planned.tier, row)

    def remove_request(self, req_id: str) -> None:
        """Forget a finished or aborted request; unknown ids are ignored."""
        self.park_request(req_id)
        self._plans.pop(req_id, None)
        self._embedded.pop(req_id, None)
        self._lost.discard(req_id)

    def prepare_step(self, view: BatchView) -> None:
        """Write the index, the rows and the bypass flags of a step before its forward.
        What has not changed is not copied."""
        if not self._rows:
            self.clear_step()
            self._mark_tables()
            return
        bypasses = self._prepare_edits(view)
        self._mark_tables()
        reads = self.readout.prepare_step(view)
        backend = self.modules.backend
        if backend and (bypasses or reads):
            tokens = int(view.num_scheduled[: len(view.req_ids)].sum())
            backend.write_flags(known_token_ids(view, tokens, self._embedded))

    def _prepare_edits(self, view: BatchView) -> bool:
        """Write rows and index; returns whether a tier edits that bypasses tokens."""
        index = self._step_index
        changed: Sequence[int] = ()
        if self._editing:
            changed = index.update(view)
            self.counts.follow(index)
        if not self._editing or index.rows is None:
            self._clear_edits()
            return False
        self._write_rows()
        if not self._written_tokens:
            changed = range(len(Tier))
        if changed:
            self._write_index(index.rows, changed)
        self.steered_tokens += index.steered
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
                self._marks_are_old = True
                self.counts.hold(tier, changes)
                tables = self.modules.tables(tier)
                write_rows(changes, tables, self.modules.table_of(tier))

    def _mark_tables(self) -> None:
        """Tell each table whether the requests of the batch hold rows that edit it.
        Steps that are not captured launch nothing for the others."""
        if not self._marks_are_old:
            return
        self._marks_are_old = False
        for tier, manager in self.managers.items():
            held = manager.held
            for bound in self.modules.tables(tier):
                bound.table.in_use = not bound.written.isdisjoint(held)

    def _write_index(self, rows: np.ndarray, tiers: Iterable[int]) -> None:
        """Bring these tiers' part of the index up to date."""
        tokens = rows.shape[1]
        same_length = tokens == self._written_tokens
        extent = max(tokens, self._written_tokens)
        for tier in tiers:
            host = self._index_host[tier, :extent]
            if same_length and np.array_equal(host, rows[tier]):
                continue
            host[:tokens] = rows[tier]
            host[tokens:] = 0
            source, on_device = self._index_part(tier, extent)
            # In a new pinned buffer each time. The copy is asynchronous, and the host
            # may prepare the next step before the copy has read the buffer.
            async_tensor_h2d(source, out=on_device)
        self._written_tokens = tokens

    def _index_part(self, tier: int, extent: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first tokens of a tier's index, on the host and on the device."""
        if extent != self._part_extent:
            host = torch.from_numpy(self._index_host)
            device = self.step.index
            self._parts = [(host[t, :extent], device[t, :extent]) for t in Tier]
            self._part_extent = extent
        return self._parts[tier]

    def check_integrity(self, live: Collection[str] | None = None) -> None:
        """Assert that the managers and the requests agree on who holds what.

        `live` are the ids that the scheduler knows, including finished requests that it
        has not yet told the worker about. If the worker knows another request, it has
        failed to forget it.
        """
        if live is not None:
            forgotten = set(self._plans) - set(live)
            assert not forgotten, f"finished requests are still known: {forgotten}"
        for tier, manager in self.managers.items():
            manager.check_integrity()
            held = {
                row
                for req_id, rows in self._rows.items()
                for planned, row in zip(self._plans[req_id].rows, rows, strict=True)
                if planned.tier is tier
            }
            assert manager.rows_in_use == len(held), f"{tier.name}: rows leaked"
        assert set(self._rows) <= set(self._plans), "rows of an unknown request"
        assert set(self._embedded) <= set(self._plans), "an unknown prompt"
        assert self._step_index.holders == self._editing, "the index disagrees"
        self.modules.inline.check_integrity(
            self._plans[req_id].vectors for req_id in self._rows
        )
        self.readout.check_integrity()


class SteeredRunner(Protocol):
    """What module changes and measurements use of a model runner."""

    steering: SteeringRuntime | None

    def use_steering_graphs(self, used: bool) -> None: ...
