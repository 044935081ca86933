# SPDX-License-Identifier: Apache-2.0
"""GPU path of the three steering tiers: which kernels run, with which sizes.

Every function here is legal under CUDA graph capture: launches depend on shapes only,
the number of steered tokens stays on the device, nothing is allocated and nothing
waits. What may change under a captured graph is what tensors hold: rows, flags,
clamps, weights, meta, norm limits. docs/design/kernels.md has the reasons.

A token is steered for a slot where its row is active in the tier's table and, for the
SAE tiers, no skip flag of the module is set and its norm is within the limit. Its
result goes to `residual` and `hidden` becomes 0 (or to `hidden` where the stream is
one tensor). The bits of any other token are never touched.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from vllm.config.steering import Tier
from vllm.model_executor.layers.steering_kernels import stages_cuda
from vllm.model_executor.layers.steering_kernels.extension import extension_is_built
from vllm.model_executor.layers.steering_kernels.run import Run
from vllm.model_executor.layers.steering_kernels.workspace import (
    SteeringWorkspace,
    uses_threshold,
    uses_topk,
)
from vllm.model_executor.layers.steering_state import (
    SAESlot,
    StepState,
    VectorSlot,
)
from vllm.triton_utils import HAS_TRITON

if HAS_TRITON:
    from vllm.model_executor.layers.steering_kernels import stages_triton

__all__ = [
    "SteeringWorkspace",
    "full_reconstruction",
    "sae_clamp",
    "steering_vectors",
    "warm_up",
]


def _check(hidden: torch.Tensor, residual: torch.Tensor | None, d_model: int) -> None:
    """Raise ValueError unless the stream has the shape that the kernels address."""
    for name, x in (("hidden", hidden), ("residual", residual)):
        if x is None:
            continue
        if x.dim() != 2 or x.shape[1] != d_model or x.stride(1) != 1:
            raise ValueError(
                f"steering: {name} has shape {tuple(x.shape)} and strides {x.stride()};"
                f" expected [tokens, {d_model}] with contiguous rows"
            )
    if residual is not None and residual.shape != hidden.shape:
        raise ValueError(
            f"steering: residual has shape {tuple(residual.shape)}, expected that of "
            f"hidden, {tuple(hidden.shape)}"
        )


def full_reconstruction(
    slot: SAESlot,
    step: StepState,
    workspace: SteeringWorkspace,
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
) -> None:
    """Replace steered tokens by their reconstruction with the row's clamps, in place.

    Args:
        slot: the SAE and its rows (`slot.full`).
        step: rows and flags of the step's tokens.
        workspace: built for this slot and at least this many tokens.
        hidden: `[T, D]`, the model's dtype.
        residual: `[T, D]`, or None where the stream is one tensor.
    """
    if uses_threshold(slot):
        _pipeline(slot, step, workspace, hidden, residual, Tier.FULL, topk=False)
    if uses_topk(slot):
        _pipeline(slot, step, workspace, hidden, residual, Tier.FULL, topk=True)


def sae_clamp(
    slot: SAESlot,
    step: StepState,
    workspace: SteeringWorkspace,
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
) -> None:
    """Add `(g_c - f_c) W_dec[c]` of the row's clamps (`slot.delta`), in place.

    Arguments as of `full_reconstruction`. TopK selects over all features, so it runs
    the encoder; a threshold activation reads the clamped features' rows only.
    """
    if uses_threshold(slot):
        _check(hidden, residual, slot.weights.d_in)
        gated = uses_topk(slot)
        if hidden.shape[0] == 0:
            return
        if _takes_clamp(slot, hidden, residual):
            stages_cuda.clamp(slot, step, gated, hidden, residual)
        else:
            stages_triton.clamp(slot, step, gated, hidden, residual)
    if uses_topk(slot):
        _pipeline(slot, step, workspace, hidden, residual, Tier.DELTA, topk=True)


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
    slot: SAESlot | VectorSlot, hidden: torch.Tensor, residual: torch.Tensor | None
) -> bool:
    """Whether the extension's clamp kernel is there and fits."""
    return extension_is_built() and stages_cuda.takes_clamp(slot, hidden, residual)


def _pipeline(
    slot: SAESlot,
    step: StepState,
    workspace: SteeringWorkspace,
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    tier: Tier,
    topk: bool,
) -> None:
    """The four stages, chunk after chunk."""
    _check(hidden, residual, slot.weights.d_in)
    tokens = hidden.shape[0]
    if tokens == 0:
        return
    if tokens > workspace.max_tokens:
        raise ValueError(
            f"steering: {tokens} tokens, workspace built for {workspace.max_tokens}"
        )
    buffers = workspace.buffers(slot, tokens, topk)
    mixed = uses_threshold(slot) and uses_topk(slot)
    run = Run(
        slot=slot,
        step=step,
        workspace=workspace,
        buffers=buffers,
        hidden=hidden,
        residual=residual,
        tier=tier,
        topk=topk,
        gate=int(topk) if mixed else -1,
    )
    cuda = extension_is_built() and stages_cuda.takes_cuda(slot, hidden, residual)
    rows = buffers.plan.rows
    for base in range(0, buffers.plan.num_chunks * rows, rows):
        if cuda:
            if stages_cuda.takes_compact_encode(run):
                stages_cuda.compact_encode(run)
            else:
                stages_cuda.compact(run, base)
                stages_cuda.encode(run, base)
            if topk:
                stages_cuda.select(run, base)
            stages_cuda.decode(run, base)
        else:
            stages_triton.compact(run, base)
            stages_triton.encode(run, base)
            stages_triton.coefficients(run, base)
            stages_triton.combine(run, base)
            stages_triton.dense(run, base)


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
    sizes = sorted({1, 2, 16, 17, 64, 65, 128, 129, 256, 257, 1024, 1025, 1 << 30})
    sizes = sorted({min(size, workspace.max_tokens) for size in sizes})
    everything: list[SAESlot | VectorSlot] = [*slots, *vector_slots]
    for tokens in sizes:
        for slot in everything:
            d_model = (
                slot.directions.shape[1]
                if isinstance(slot, VectorSlot)
                else slot.weights.d_in
            )
            shape = (tokens, d_model)
            hidden = torch.zeros(shape, dtype=dtype, device=step.index.device)
            for residual in (torch.zeros_like(hidden), None):
                if isinstance(slot, VectorSlot):
                    steering_vectors(slot, step, hidden, residual)
                else:
                    full_reconstruction(slot, step, workspace, hidden, residual)
                    sae_clamp(slot, step, workspace, hidden, residual)
