# SPDX-License-Identifier: Apache-2.0
"""Seam into `vllm.v1.core.sched.scheduler`: what a step has read goes to its requests.

The edits a branch would make: `update_from_output` hands `model_runner_output.
sae_readout` to `StepReads`, ends the requests of which a stop condition holds, and
`EngineCoreOutputs` has a field for the rows of a step. A msgspec struct cannot grow, so
here they travel in `ec_transfer_params` of the step's first output under a key of ours,
which the front end takes out again (`plugins/steering/v1/engine/output_processor.py`).

A step in which no request reads costs one look-up.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vllm.config.sae_readout_step import READOUT_ATTRIBUTE
from vllm.plugins.steering.seam import Stock, declare, wrap
from vllm.v1.core.sched.steering_readout import is_dropped, positions, step_reads
from vllm.v1.engine.steering_reads import Fired, StepReads

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
        fired = {
            req_id: found
            for req_id, found in reads.take(
                readout, starts, counts, self.requests
            ).items()
            if not is_dropped(self.requests.get(req_id))
        }
        with stopping(self, reads, fired):
            outputs = stock(self, scheduler_output, model_runner_output)
        reads.attach(outputs)
        return outputs

    return update_from_output


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
