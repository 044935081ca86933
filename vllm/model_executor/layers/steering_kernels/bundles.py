# SPDX-License-Identifier: Apache-2.0
"""What the CUDA ops are given: bundles of tensors, each in a fixed order.

`csrc/steering/constants.cuh` states the same orders, `checks.h` checks every tensor.
What is the same in every step is held by the extension (`Held`), and passed by number.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch

from vllm.config.steering import Tier
from vllm.model_executor.layers.steering_clamp_table import ClampTable
from vllm.model_executor.layers.steering_read_state import ReadBuffers
from vllm.model_executor.layers.steering_state import (
    SAESlot,
    SAEWeights,
    StepState,
)

from .held import Held, Tensors
from .peers import Peers
from .run import Run
from .workspace import SteeringWorkspace

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


def _make_run_held(run: Run) -> Held:
    return Held(
        step_bundle(run.step, run.index, run.table, run.slot.saturated, run.reads),
        weights_bundle(run.slot.weights, run.peers),
        _workspace_bundle(run),
    )


def _place(tensor: torch.Tensor | None) -> Hashable:
    """What tells a view that is made anew in each step from another one."""
    return None if tensor is None else (tensor.data_ptr(), tensor.shape)


def run_held(run: Run) -> Held:
    """All that a run's stages take but the stream.

    The buffers belong to the slot, the number of tokens, and the activation.
    """
    own = (_place(run.own_scores), _place(run.own_index))
    key = (run.step, run.buffers, run.tier, run.edits, run.reads, run.peers, own)
    return run.workspace.held.get(key, lambda: _make_run_held(run))


def clamp_held(slot: SAESlot, step: StepState, workspace: SteeringWorkspace) -> Held:
    """Step and weights of the delta tier of a threshold SAE."""

    def make() -> Held:
        peers = None if slot.weights.shard.is_whole else workspace.peers
        return Held(
            step_bundle(step, step.index[Tier.DELTA], slot.delta, slot.saturated),
            weights_bundle(slot.weights, peers),
        )

    return workspace.held.get((step, slot), make)


def reading_bundles(run: Run) -> tuple[int, Tensors]:
    """What is held for a run, and the stream of a stage that reads: `run.read`."""
    return run_held(run).number, stream_bundle(*run.read)


def writing_bundles(run: Run) -> tuple[int, Tensors]:
    """What is held for a run, and the stream of the stage that writes."""
    return run_held(run).number, stream_bundle(run.hidden, run.residual)
