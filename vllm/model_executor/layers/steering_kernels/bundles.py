# SPDX-License-Identifier: Apache-2.0
"""What the CUDA ops are given: bundles of tensors, each in a fixed order.

`csrc/steering/constants.cuh` states the same orders, `checks.h` checks every tensor.
"""

from __future__ import annotations

import torch

from vllm.config.steering import Tier
from vllm.model_executor.layers.steering_read_state import ReadBuffers
from vllm.model_executor.layers.steering_state import (
    ClampTable,
    SAESlot,
    SAEWeights,
    StepState,
)

from .peers import Peers
from .run import Run
from .workspace import SteeringWorkspace, Tensors

WEIGHTS_FIELDS = (
    "W_enc", "b_enc", "threshold", "W_dec", "b_dec", "meta", "norm_limit", "shared",
)  # fmt: skip
WORKSPACE_FIELDS = (
    "x", "records", "count", "sync", "entries", "scores", "kth", "coef",
    "dense", "skip",
)  # fmt: skip
STEP_FIELDS = (
    "index", "flags", "table", "saturated",
    "read_index", "read_table", "read_scale", "read_out",
)  # fmt: skip
STREAM_FIELDS = ("hidden", "residual")
GUESS_FIELDS = ("samples", "bars", "failed")


def weights_bundle(weights: SAEWeights, peers: Peers | None = None) -> Tensors:
    """The tensors of `WEIGHTS_FIELDS`; the last where ranks share the SAE."""
    w = weights
    own = [w.W_enc, w.b_enc, w.threshold, w.W_dec, w.b_dec, w.meta, w.norm_limit]
    return own if peers is None else [*own, peers.shared]


def step_bundle(
    step: StepState,
    index: torch.Tensor,
    table: ClampTable,
    saturated: torch.Tensor,
    reads: ReadBuffers | None = None,
) -> Tensors:
    """The tensors of `STEP_FIELDS`, for the tier of `index` and `table`,
    with the counter of the slot.

    Those of reading are left out where nobody reads.
    """
    own = [index, step.flags, table.packed, saturated]
    if reads is None:
        return own
    return [*own, step.read_index, reads.packed, reads.scale, reads.out]


def stream_bundle(hidden: torch.Tensor, residual: torch.Tensor | None) -> Tensors:
    """The tensors of `STREAM_FIELDS`; one where the stream is one tensor."""
    return [hidden] if residual is None else [hidden, residual]


def _workspace_bundle(run: Run) -> Tensors:
    """The tensors of `WORKSPACE_FIELDS`; the last where there is a skip connection."""
    ws, buffers = run.workspace, run.buffers
    own = [
        buffers.x, ws.records, ws.count, run.step.sync, buffers.entries,
        buffers.scores if run.own_scores is None else run.own_scores,
        ws.kth, buffers.coef, buffers.dense,
    ]  # fmt: skip
    return own if run.slot.weights.W_skip is None else [*own, buffers.skip]


def _make_run_bundles(run: Run) -> tuple[Tensors, Tensors, Tensors]:
    """Step, weights and workspace: all but the stream."""
    return (
        step_bundle(run.step, run.index, run.table, run.slot.saturated, run.reads),
        weights_bundle(run.slot.weights, run.peers),
        _workspace_bundle(run),
    )


def _run_bundles(
    run: Run, stream: Tensors
) -> tuple[Tensors, Tensors, Tensors, Tensors]:
    if run.own_scores is not None or run.own_index is not None:  # new in each step
        step, weights, workspace = _make_run_bundles(run)
    else:
        # The buffers belong to the slot, the number of tokens, and the activation.
        key = (run.step, run.buffers, run.tier, run.edits, run.reads, run.peers)
        kept = run.workspace.bundles
        step, weights, workspace = kept.get(key, lambda: _make_run_bundles(run))
    return step, weights, stream, workspace


def clamp_bundles(
    slot: SAESlot, step: StepState, workspace: SteeringWorkspace
) -> tuple[Tensors, Tensors]:
    """Step and weights of the delta tier of a threshold SAE."""

    def make() -> tuple[Tensors, Tensors]:
        peers = None if slot.weights.shard.is_whole else workspace.peers
        return (
            step_bundle(step, step.index[Tier.DELTA], slot.delta, slot.saturated),
            weights_bundle(slot.weights, peers),
        )

    return workspace.clamp_bundles.get((step, slot), make)


def reading_bundles(run: Run) -> tuple[Tensors, Tensors, Tensors, Tensors]:
    """Step, weights, stream and workspace of a stage that reads: `run.read`."""
    return _run_bundles(run, stream_bundle(*run.read))


def writing_bundles(run: Run) -> tuple[Tensors, Tensors, Tensors, Tensors]:
    """Step, weights, stream and workspace of the stage that writes."""
    return _run_bundles(run, stream_bundle(run.hidden, run.residual))
