# SPDX-License-Identifier: Apache-2.0
"""What the scheduler knows about the rows that a step has read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vllm.config.sae_readout_step import StepReadout
from vllm.v1.engine.steering_reads import StepReads, step_start

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request


def step_reads(scheduler: Scheduler) -> StepReads:
    """What the scheduler's steps have read."""
    if scheduler.sae_step_reads is None:
        scheduler.sae_step_reads = StepReads()
    return scheduler.sae_step_reads


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
        if request is None or is_dropped(request):
            found.append((computed, 0))
            continue
        at = model_runner_output.req_id_to_index[req_id]
        num_drafts = len(drafts.get(req_id, ()))
        generated = len(sampled[at]) if sampled else 0
        num_tokens = request.num_tokens
        found.append(step_start(num_tokens, own, computed, num_drafts, generated))
    starts, counts = np.array(found, dtype=np.int64).T
    return starts, counts


def is_dropped(request: Request | None) -> bool:
    """Whether the scheduler will drop this step's output of the request."""
    if request is None or request.is_finished():
        return True
    return bool(request.drop_stale_output and request.num_stale_output_tokens > 0)
