# SPDX-License-Identifier: Apache-2.0
"""GPU path of the three steering tiers: which kernels run, with which sizes.

Every function here may run under CUDA graph capture. Launches depend on shapes only,
the number of steered tokens stays on the device, and nothing allocates or synchronises.
Under a captured graph only the contents of tensors may change: rows, flags, clamps,
weights, meta and norm limits. docs/design/kernels.md has the reasons.

A slot steers a token if the token's row is active in the tier's table. The SAE tiers
also need that no skip flag of the module is set and that the norm is within the limit.
The result goes to `residual`, and `hidden` becomes 0; if the stream is one tensor, the
result goes to `hidden`. The bits of other tokens never change.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from vllm.config.steering import Tier
from vllm.model_executor.layers.steering_kernels import (
    stages_cuda,
    stages_shared_cuda,
)
from vllm.model_executor.layers.steering_kernels.extension import extension_is_built
from vllm.model_executor.layers.steering_kernels.plan import (
    LIST_MAX,
    warm_up_lengths,
)
from vllm.model_executor.layers.steering_kernels.run import Run
from vllm.model_executor.layers.steering_kernels.workspace import (
    SteeringWorkspace,
    uses_threshold,
    uses_topk,
)
from vllm.model_executor.layers.steering_read_state import ReadBuffers
from vllm.model_executor.layers.steering_state import (
    SAESlot,
    StepState,
    VectorSlot,
)
from vllm.triton_utils import HAS_TRITON

if HAS_TRITON:
    from vllm.model_executor.layers.steering_kernels import (
        stages_shared,
        stages_triton,
        stages_triton_dense,
        stages_triton_read,
    )


@dataclass(frozen=True)
class Passage:
    """What one passage of a step through a slot does.

    reads: who reads features on the way; None: nobody. Only the extension can.
    edits: False where no token is to be changed, whatever its row.
    """

    tier: Tier
    reads: ReadBuffers | None = None
    edits: bool = True


FULL, DELTA = Passage(Tier.FULL), Passage(Tier.DELTA)


def _check_rows(name: str, x: torch.Tensor, width: int) -> None:
    if x.dim() != 2 or x.shape[1] != width or x.stride(1) != 1:
        raise ValueError(
            f"steering: {name} has shape {tuple(x.shape)} and strides {x.stride()};"
            f" expected [tokens, {width}] with contiguous rows"
        )


def _check(hidden: torch.Tensor, residual: torch.Tensor | None, d_model: int) -> None:
    """Raise ValueError unless the stream has the shape that the kernels address."""
    _check_rows("hidden", hidden, d_model)
    if residual is not None:
        _check_rows("residual", residual, d_model)
    if residual is not None and residual.shape != hidden.shape:
        raise ValueError(
            f"steering: residual has shape {tuple(residual.shape)}, expected that of "
            f"hidden, {tuple(hidden.shape)}"
        )


def _check_source(
    slot: SAESlot, hidden: torch.Tensor, source: torch.Tensor | None
) -> None:
    """Raise ValueError unless a source is given exactly when the encoder reads one."""
    if (source is not None) != slot.reads_source:
        raise ValueError(
            f"steering: source given: {source is not None}, but the slot reads one: "
            f"{slot.reads_source}"
        )
    if source is None:
        return
    _check_rows("source", source, slot.weights.d_in)
    if source.shape[0] != hidden.shape[0] or source.dtype != hidden.dtype:
        raise ValueError(
            f"steering: source has {source.shape[0]} tokens of {source.dtype}; "
            f"expected {hidden.shape[0]} of {hidden.dtype}"
        )


def full_reconstruction(
    slot: SAESlot,
    step: StepState,
    workspace: SteeringWorkspace,
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    source: torch.Tensor | None = None,
    passage: Passage = FULL,
) -> None:
    """Replace steered tokens by their reconstruction with the row's clamps, in place.

    Args:
        slot: the SAE and its rows (`slot.full`).
        step: rows and flags of the step's tokens.
        workspace: built for this slot and at least this many tokens.
        hidden: `[T, d_out]`, the model's dtype.
        residual: `[T, d_out]`, or None where the stream is one tensor.
        source: `[T, d_in]`, what a transcoder's encoder reads; None for an SAE.
        passage: who reads on the way (`reads_on_the_way`), and whether tokens change.
    """
    _check_source(slot, hidden, source)
    streams = (hidden, residual, source)
    if uses_threshold(slot):
        _pipeline(_make_run(slot, step, workspace, passage, False, *streams))
    if uses_topk(slot):
        _pipeline(_make_run(slot, step, workspace, passage, True, *streams))


def reads_on_the_way(
    slot: SAESlot, hidden: torch.Tensor, residual: torch.Tensor | None
) -> bool:
    """Whether one passage through the slot can read features and edit tokens."""
    if slot.reads_source or not extension_is_built():
        return False
    if not slot.weights.shard.is_whole:
        return False
    return stages_cuda.takes_cuda(slot, hidden, residual)


def sae_clamp(
    slot: SAESlot,
    step: StepState,
    workspace: SteeringWorkspace,
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    source: torch.Tensor | None = None,
) -> None:
    """Add `(g_c - f_c) W_dec[c]` of the row's clamps (`slot.delta`), in place.

    The arguments are those of `full_reconstruction`. TopK selects among all features,
    so it runs the whole encoder. A threshold activation reads only the clamped
    features' rows.
    """
    _check_source(slot, hidden, source)
    if uses_threshold(slot):
        _check(hidden, residual, slot.weights.d_out)
        gated = uses_topk(slot)
        if hidden.shape[0] == 0:
            return
        if not slot.weights.shard.is_whole:
            _shared_clamp(slot, step, workspace, gated, (hidden, residual, source))
        elif _takes_clamp(slot, hidden, residual, source):
            stages_cuda.clamp(slot, step, workspace, gated, hidden, residual, source)
        else:
            stages_triton.clamp(slot, step, gated, hidden, residual, source)
    if uses_topk(slot):
        streams = (hidden, residual, source)
        _pipeline(_make_run(slot, step, workspace, DELTA, True, *streams))


def _shared_clamp(
    slot: SAESlot,
    step: StepState,
    workspace: SteeringWorkspace,
    gated: bool,
    streams: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None],
) -> None:
    """The delta tier of a threshold SAE that ranks share; streams as `sae_clamp`'s."""
    if stages_shared_cuda.takes_clamp(slot, *streams):
        stages_shared_cuda.clamp(slot, step, workspace, gated, *streams[:2])
    else:
        stages_shared.clamp(slot, step, workspace, gated, *streams)


def steering_vectors(
    slot: VectorSlot,
    step: StepState,
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
) -> None:
    """Add the row's sum of scaled directions (`slot.table`), in place."""
    _check(hidden, residual, slot.directions.shape[1])
    if hidden.shape[0] == 0:
        return
    if _takes_clamp(slot, hidden, residual):
        stages_cuda.add_vectors(slot, step, hidden, residual)
    else:
        stages_triton.add_vectors(slot, step, hidden, residual)


def _takes_clamp(
    slot: SAESlot | VectorSlot,
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    source: torch.Tensor | None = None,
) -> bool:
    """Whether the extension is built and its clamp kernel fits."""
    return extension_is_built() and stages_cuda.takes_clamp(
        slot, hidden, residual, source
    )


def _takes_stages(
    slot: SAESlot,
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    source: torch.Tensor | None,
) -> bool:
    """Whether the extension is built and its stages fit."""
    return extension_is_built() and stages_cuda.takes_cuda(
        slot, hidden, residual, source
    )


def _make_run(
    slot: SAESlot,
    step: StepState,
    workspace: SteeringWorkspace,
    passage: Passage,
    topk: bool,
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    source: torch.Tensor | None,
) -> Run | None:
    """A pipeline over the step; None for a step without tokens."""
    _check(hidden, residual, slot.weights.d_out)
    if hidden.shape[0] == 0:
        return None
    # Longer lists are not decoded. Reading looks for the largest of all, and other
    # selections than the extension's keep their candidates there.
    whole = passage.reads is not None
    if topk:
        whole |= not slot.weights.shard.is_whole or not _takes_stages(
            slot, hidden, residual, source
        )
    return Run.over(
        slot,
        step,
        workspace,
        hidden,
        residual,
        tier=passage.tier,
        topk=topk,
        capacity=None if whole else LIST_MAX,
        source=source,
        reads=passage.reads,
        edits=passage.edits,
    )


def _pipeline(run: Run | None) -> None:
    """The stages, chunk after chunk."""
    if run is None:
        return
    if not run.slot.weights.shard.is_whole:
        peers = run.workspace.peers
        if peers is not None and stages_shared_cuda.takes(run):
            stages_shared_cuda.pipeline(run, peers)
        else:
            stages_shared.pipeline(run)
        return
    cuda = _takes_stages(run.slot, run.hidden, run.residual, run.source)
    if cuda and stages_cuda.takes_guess(run):
        guess = run.workspace.guess_buffers(run.slot, run.hidden.shape[0])
        if guess is not None:
            run = stages_cuda.guess(run, guess)
    plan, weights = run.buffers.plan, run.slot.weights
    for base in range(0, plan.num_chunks * plan.rows, plan.rows):
        if cuda:
            if stages_cuda.takes_compact_encode(run):
                stages_cuda.compact_encode(run)
            else:
                stages_cuda.compact(run, base)
                stages_cuda.encode(run, base)
            if run.topk:
                stages_cuda.select(run, base)
            if weights.W_skip is not None and run.tier is Tier.FULL:
                stages_triton_dense.write_skip(run, weights.W_skip, base)
            if run.reads is not None and plan.capacity < weights.d_sae_capacity:
                stages_triton_read.read_out(run, run.reads, base, overflow=True)
            stages_cuda.decode(run, base)
        else:
            stages_triton.compact(run, base)
            stages_triton.encode(run, base)
            stages_triton.coefficients(run, base)
            stages_triton.combine(run, base)
            stages_triton_dense.dense(run)


def warm_up(
    slots: Iterable[SAESlot],
    vector_slots: Iterable[VectorSlot],
    step: StepState,
    workspace: SteeringWorkspace,
    dtype: torch.dtype,
) -> None:
    """Run every specialisation that serving can hit, before capture.

    Rows of `step` are zero at start-up, so nothing is edited; kernels compile anyway.
    Both forms of the stream and every launch size class are covered.
    """
    slots, vector_slots = list(slots), list(vector_slots)
    device = step.index.device
    for tokens in warm_up_lengths(workspace.max_tokens):
        for slot in slots:
            weights = slot.weights
            hidden = torch.zeros(tokens, weights.d_out, dtype=dtype, device=device)
            source = None
            if slot.reads_source:
                source = torch.zeros(tokens, weights.d_in, dtype=dtype, device=device)
            for residual in (torch.zeros_like(hidden), None):
                full_reconstruction(slot, step, workspace, hidden, residual, source)
                sae_clamp(slot, step, workspace, hidden, residual, source)
        for vectors in vector_slots:
            width = vectors.directions.shape[1]
            hidden = torch.zeros(tokens, width, dtype=dtype, device=device)
            for residual in (torch.zeros_like(hidden), None):
                steering_vectors(vectors, step, hidden, residual)
