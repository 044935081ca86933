# SPDX-License-Identifier: Apache-2.0
"""Seam into `vllm.v1.core.sched.scheduler`: what a step has read goes to its requests.

The edits a branch would make: `update_from_output` takes each request's rows of
`model_runner_output.sae_readout` beside its log-probabilities, ends the request where a
stop condition holds, and `EngineCoreOutput` has a field for the rows. A msgspec struct
cannot grow, so here they travel in `ec_transfer_params` under a key of ours, which the
front end takes out again (`plugins/steering/v1/engine/output_processor.py`).

A step in which nobody reads costs one look-up.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vllm.config.sae_readout_step import READOUT_ATTRIBUTE, StepReadout
from vllm.plugins.steering.seam import Stock, wrap
from vllm.v1.engine.steering_reads import (
    PAYLOAD_KEY,
    Fired,
    RequestReads,
    StepRows,
    step_start,
)

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

MODULE = "vllm.v1.core.sched.scheduler"


def install() -> None:
    """Take what a step has read."""
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
        took, fired = take_step(self, scheduler_output, model_runner_output, readout)
        with stopping(self, fired):
            outputs = stock(self, scheduler_output, model_runner_output)
        attach(outputs, took)
        return outputs

    return update_from_output


def take_step(
    scheduler: Scheduler,
    scheduler_output: SchedulerOutput,
    model_runner_output: ModelRunnerOutput,
    readout: StepReadout,
) -> tuple[dict[str, RequestReads], dict[str, Fired]]:
    """Give every live request its rows; the requests, and those that end."""
    took: dict[str, RequestReads] = {}
    fired: dict[str, Fired] = {}
    sampled = model_runner_output.sampled_token_ids
    drafts = scheduler_output.scheduled_spec_decode_tokens
    rows = StepRows(readout)
    for req_id, first_row, own, computed in zip(
        readout.req_ids,
        readout.first_rows,
        readout.num_tokens,
        readout.num_computed,
        strict=True,
    ):
        request = scheduler.requests.get(req_id)
        if request is None or request.is_finished():
            continue
        reads = request.sae_reads
        if reads is None or _is_dropped(request):
            continue
        at = model_runner_output.req_id_to_index[req_id]
        start, accepted = step_start(
            request.num_tokens,
            own,
            computed,
            len(drafts.get(req_id, ())),
            len(sampled[at]) if sampled else 0,
        )
        found = reads.take(rows, first_row, start, accepted)
        took[req_id] = reads
        if found is not None:
            fired[req_id] = found
    return took, fired


def _is_dropped(request: Request) -> bool:
    """Whether the scheduler will drop this step's output of the request."""
    return request.drop_stale_output and request.num_stale_output_tokens > 0


@contextmanager
def stopping(scheduler: Scheduler, fired: dict[str, Fired]) -> Iterator[None]:
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
        return kept, True

    scheduler._update_request_with_output = _update_request_with_output
    try:
        yield
    finally:
        del scheduler._update_request_with_output


def attach(
    outputs: dict[int, EngineCoreOutputs], took: dict[str, RequestReads]
) -> None:
    """Put the rows that are due into the outputs of their requests."""
    for of_client in outputs.values():
        for output in of_client.outputs:
            reads = took.get(output.request_id)
            if reads is None or (reads.waits and output.finish_reason is None):
                continue
            payload = reads.payload()
            if payload is not None:
                params = output.ec_transfer_params or {}
                output.ec_transfer_params = {**params, PAYLOAD_KEY: payload}
