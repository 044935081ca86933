# SPDX-License-Identifier: Apache-2.0
"""The stages of an SAE that ranks share, in CUDA C++ (csrc/steering/exchange.cuh).

Each rank encodes its own features, stores the non-zeros into its peers' memory, joins
the lists of all ranks, decodes its own columns and stores those into its peers' memory.
Only what is there moves, and a step without active tokens moves nothing.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from vllm.config.steering import Tier
from vllm.model_executor.layers.steering_state import SAESlot, StepState

from . import stages_cuda
from .bundles import clamp_held, reading_bundles, stream_bundle, writing_bundles
from .extension import cuda_ops
from .peers import SEND_ACTS, SEND_COLUMNS, WRITE_TOKENS, Peers
from .plan import LIST_MAX, cdiv, sorts_ahead
from .run import Run
from .workspace import SteeringWorkspace, exchanges

# DensePhase (csrc/steering/dense.cuh): the first in which a rank waits, and the end.
PULLED, PHASES = 4, 7


def takes(run: Run) -> bool:
    """Whether the kernels fit this site and its stream; the ranks have an arena."""
    return (
        exchanges(run.slot)
        and run.source is None
        and stages_cuda.takes_cuda(run.slot, run.hidden, run.residual)
    )


def takes_clamp(
    slot: SAESlot,
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    source: torch.Tensor | None,
) -> bool:
    """Whether the clamp kernel fits this site's delta tier; the ranks have an arena."""
    fits = exchanges(slot) and source is None
    return fits and stages_cuda.takes_clamp(slot, hidden, residual)


def clamp(
    slot: SAESlot,
    step: StepState,
    workspace: SteeringWorkspace,
    gated: bool,
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
) -> None:
    """The delta tier of a threshold SAE; with `gated`, a TopK module is skipped."""
    peers = workspace.peers
    assert peers is not None
    together = (SEND_ACTS | SEND_COLUMNS | WRITE_TOKENS,)
    parts = (SEND_ACTS, SEND_COLUMNS, WRITE_TOKENS) if peers.apart else together
    for base in range(0, hidden.shape[0], peers.layout.clamps.rows):
        for part in parts:
            peers.turn()
            cuda_ops().shared_clamp(
                clamp_held(slot, step, workspace).number,
                stream_bundle(hidden, residual),
                peers.clamps,
                gated=gated,
                base=base,
                parts=part,
            )


def pipeline(run: Run, peers: Peers) -> None:
    """All stages, chunk after chunk."""
    plan, run = run.buffers.plan, replace(run, peers=peers)
    is_delta = run.tier is Tier.DELTA
    many = sorts_ahead(plan.rows)
    # One launch sends lists, decodes, and writes what it can.
    together = not (many or peers.apart)
    for base in range(0, plan.num_chunks * plan.rows, plan.rows):
        _encode(run, peers, base)
        if not (run.topk or together):
            cuda_ops().push(*reading_bundles(run), base=base)
        peers.turn()
        modes = {"topk": run.topk, "delta": is_delta, "many": many}
        cuda_ops().decode_columns(
            *writing_bundles(run), base=base, **modes, together=together
        )
        if not is_delta and run.slot.weights.d_sae_capacity > LIST_MAX:
            _dense(run, peers, base)
        if peers.apart:
            peers.turn()
        cuda_ops().write_columns(*writing_bundles(run), base=base, together=together)


def _encode(run: Run, peers: Peers, base: int) -> None:
    """This rank's lists; or all scores, and which are selected."""
    rows, weights = run.buffers.plan.rows, run.slot.weights
    own = run
    if run.topk:
        scores = peers.staged(rows, weights.W_enc.shape[0], torch.float32)
        own = replace(run, own_scores=scores)
    if stages_cuda.takes_compact_encode(own):
        stages_cuda.compact_encode(own)
    else:
        stages_cuda.compact(own, base)
        stages_cuda.encode(own, base)
    if own.own_scores is not None:
        peers.turn()
        peers.pull(own.own_scores, run.buffers.scores, run.workspace.count, base)
        stages_cuda.select(run, base)


def _dense(run: Run, peers: Peers, base: int) -> None:
    """Tokens with more non-zeros than a list holds: their number is on the device."""

    def launch(chunk: int, first: int, end: int) -> None:
        bundles = writing_bundles(run)
        cuda_ops().dense_columns(
            *bundles, base=base, topk=run.topk, chunk=chunk, first=first, end=end
        )

    plan = run.buffers.plan
    for chunk in range(cdiv(plan.rows, plan.dense_rows)):
        if run.topk or not peers.apart:
            launch(chunk, 0, PHASES)
            continue
        launch(chunk, 0, PULLED)
        peers.turn()
        launch(chunk, PULLED, PHASES)
        peers.turn()
