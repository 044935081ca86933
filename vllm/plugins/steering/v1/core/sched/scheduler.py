# SPDX-License-Identifier: Apache-2.0
"""Seam into `vllm.v1.core.sched.scheduler`: what a step has read goes to its requests.

The edits a branch would make: `update_from_output` hands `model_runner_output.
sae_readout` to `StepReads`, ends the requests of which a stop condition holds, and
`EngineCoreOutputs` has a field for the rows of a step. A msgspec struct cannot grow, so
here they travel in `ec_transfer_params` of the step's first output under a key of ours,
which the front end takes out again (`plugins/steering/v1/engine/output_processor.py`).

A step in which nobody reads costs one look-up.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from vllm.config.sae_readout_step import READOUT_ATTRIBUTE, StepReadout
from vllm.plugins.steering.seam import Stock, declare, wrap
from vllm.v1.engine.steering_reads import Fired, StepReads, step_start

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

MODULE = "vllm.v1.core.sched.scheduler"


def install() -> None:
    """Take what a step has read."""
    declare(f"{MODULE}:Scheduler", "sae_step_reads")
    wrap(
        f"{MODULE}:Scheduler.update_from_output",
        ("self", "scheduler_output", "model_runner_output"),
        _make_update_from_output,
    )


def step_reads(scheduler: Scheduler) -> StepReads:
    """What the scheduler's steps have read."""
    if scheduler.sae_step_reads is None:
        scheduler.sae_step_reads = StepReads()
    return scheduler.sae_step_reads


def _make_update_from_output(stock: Stock) -> Stock:
    def update_from_output(
        self: Scheduler,
        scheduler_output: SchedulerOutput,
        model_runner_output: ModelRunnerOutput,
    ) -> object:
        readout = vars(model_runner_output).get(READOUT_ATTRIBUTE)
        if readout is None:
            return stock(self, scheduler_output, model_runner_output)
        reads = step_reads(self)
        starts, counts = positions(self, scheduler_output, model_runner_output, readout)
        fired = reads.take(readout, starts, counts, self.requests)
        fired = {
            req_id: found
            for req_id, found in fired.items()
            if not _is_dropped(self.requests.get(req_id))
        }
        with stopping(self, reads, fired):
            outputs = stock(self, scheduler_output, model_runner_output)
        reads.attach(outputs)
        return outputs

    return update_from_output


def positions(
    scheduler: Scheduler,
    scheduler_output: SchedulerOutput,
    model_runner_output: ModelRunnerOutput,
    readout: StepReadout,
) -> tuple[np.ndarray, np.ndarray]:
    """(position of each request's first token, how many of its tokens count).

    Without drafts the worker knows both.
    """
    if not scheduler.num_spec_tokens:
        return readout.num_computed, readout.num_tokens
    sampled = model_runner_output.sampled_token_ids
    drafts = scheduler_output.scheduled_spec_decode_tokens
    found = []
    for req_id, own, computed in zip(
        readout.req_ids,
        readout.num_tokens.tolist(),
        readout.num_computed.tolist(),
        strict=True,
    ):
        request = scheduler.requests.get(req_id)
        if request is None or _is_dropped(request):
            found.append((computed, 0))
            continue
        at = model_runner_output.req_id_to_index[req_id]
        num_drafts = len(drafts.get(req_id, ()))
        generated = len(sampled[at]) if sampled else 0
        num_tokens = request.num_tokens
        found.append(step_start(num_tokens, own, computed, num_drafts, generated))
    starts, counts = np.array(found, dtype=np.int64).T
    return starts, counts


def _is_dropped(request: Request | None) -> bool:
    """Whether the scheduler will drop this step's output of the request."""
    if request is None or request.is_finished():
        return True
    return bool(request.drop_stale_output and request.num_stale_output_tokens > 0)


@contextmanager
def stopping(
    scheduler: Scheduler, reads: StepReads, fired: dict[str, Fired]
) -> Iterator[None]:
    """While a step's output is taken: end the requests whose condition holds."""
    if not fired:
        yield
        return
    from vllm.v1.request import RequestStatus

    update = scheduler._update_request_with_output

    def _update_request_with_output(
        request: Request, new_token_ids: list[int], is_stale: bool = False
    ) -> tuple[list[int], bool]:
        found = fired.get(request.request_id)
        if found is None:
            return update(request, new_token_ids, is_stale=is_stale)
        # The token at `position` is the last one that is kept.
        keep = max(found.position + 1 - request.num_tokens, 0)
        kept, stopped = update(request, new_token_ids[:keep], is_stale=is_stale)
        if not stopped:
            request.status = RequestStatus.FINISHED_STOPPED
            request.stop_reason = found.reason
            reads.stopped(found)
        return kept, True

    scheduler._update_request_with_output = _update_request_with_output
    try:
        yield
    finally:
        del scheduler._update_request_with_output
