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

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from vllm.config.steering import Tier
from vllm.model_executor.layers.steering_state import (
    ClampTable,
    SAESlot,
    StepState,
    VectorSlot,
)
from vllm.model_executor.layers.steering_kernels.extension import (
    cuda_ops,
    extension_is_built,
)
from vllm.model_executor.layers.steering_kernels.plan import (
    EncodePlan,
    cdiv,
    next_power_of_2,
    plan_encode,
    prefetches_decoder,
    sorts_ahead,
)
from vllm.model_executor.layers.steering_kernels.workspace import (
    StageBuffers,
    SteeringWorkspace,
    uses_threshold,
    uses_topk,
)
from vllm.triton_utils import HAS_TRITON

if HAS_TRITON:
    from triton.tools.tensor_descriptor import TensorDescriptor

    from vllm.model_executor.layers.steering_kernels.clamp import clamp_kernel
    from vllm.model_executor.layers.steering_kernels.combine import combine_kernel
    from vllm.model_executor.layers.steering_kernels.compact import compact_kernel
    from vllm.model_executor.layers.steering_kernels.encode import encode_kernel
    from vllm.model_executor.layers.steering_kernels.resolve import resolve_kernel
    from vllm.model_executor.layers.steering_kernels.select import select_kernel

__all__ = [
    "SteeringWorkspace",
    "full_reconstruction",
    "sae_clamp",
    "steering_vectors",
    "warm_up",
]

COMBINE_SLICE = 256  # columns of a decoder program
COMBINE_ROWS = 16  # rows of W_dec that it gathers at a time
TOKEN_GROUP_ROWS = 2048  # tokens whose activations the encoder keeps in L2


@functools.cache
def _device_facts(device: torch.device) -> tuple[int, bool, bool]:
    """(multiprocessors, has TMA, can overlap dependent launches) of a device."""
    if device.type != "cuda":
        return 4, False, False
    properties = torch.cuda.get_device_properties(device)
    hopper = properties.major >= 9
    return properties.multi_processor_count, hopper, hopper


def _takes_cuda(
    slot: SAESlot, hidden: torch.Tensor, residual: torch.Tensor | None
) -> bool:
    """Whether the extension runs here: built, on Hopper, 16-byte rows of 16 bits."""
    device = hidden.device
    if not extension_is_built() or device.type != "cuda":
        return False
    if torch.cuda.get_device_capability(device) != (9, 0):
        return False
    streams = (hidden,) if residual is None else (hidden, residual)
    return slot.weights.W_enc.element_size() == 2 and all(
        x.shape[1] % 8 == 0 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
        for x in streams
    )


def _pdl(device: torch.device) -> dict[str, Any]:
    """Launch options that let a kernel's prologue overlap its predecessor's end."""
    on = _device_facts(device)[2]
    return {"PDL": True, "launch_pdl": True} if on else {"PDL": False}


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
        w = slot.weights
        _clamp(slot.delta, Tier.DELTA, step, slot, w.W_dec, hidden, residual)
    if uses_topk(slot):
        _pipeline(slot, step, workspace, hidden, residual, Tier.DELTA, topk=True)


def steering_vectors(
    slot: VectorSlot,
    step: StepState,
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
) -> None:
    """Add the row's sum of scaled directions (`slot.table`), in place."""
    _clamp(slot.table, Tier.ADDITIVE, step, None, slot.directions, hidden, residual)


def _clamp(
    table: ClampTable,
    tier: Tier,
    step: StepState,
    slot: SAESlot | None,
    directions: torch.Tensor,
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
) -> None:
    d_model = directions.shape[1]
    _check(hidden, residual, d_model)
    tokens = hidden.shape[0]
    if tokens == 0:
        return
    weights = None if slot is None else slot.weights
    unused = step.flags  # an argument that the kernel does not read
    row_d = next_power_of_2(d_model)
    clamp_kernel[(tokens,)](
        step.index[tier],
        step.flags,
        table.packed,
        unused if weights is None else weights.meta,
        unused if weights is None else weights.norm_limit,
        unused if weights is None else weights.W_enc,
        unused if weights is None else weights.b_enc,
        unused if weights is None else weights.threshold,
        directions,
        hidden,
        hidden if residual is None else residual,
        hidden.stride(0),
        0 if residual is None else residual.stride(0),
        table.packed.stride(0),
        D=d_model,
        HAS_RESIDUAL=residual is not None,
        ENCODES=weights is not None,
        GATED=slot is not None and uses_topk(slot),
        MAX_CLAMPS=table.max_clamps,
        NC=8,
        BLOCK_D=min(row_d, 512),
        ROW_D=row_d,
        num_warps=4 if row_d <= 1024 else 8,
        **_pdl(hidden.device),
    )


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
    _check(hidden, residual, slot.weights.d_model)
    tokens = hidden.shape[0]
    if tokens == 0:
        return
    if tokens > workspace.max_tokens:
        raise ValueError(
            f"steering: {tokens} tokens, workspace built for {workspace.max_tokens}"
        )
    buffers = workspace.buffers(slot, tokens, topk)
    mixed = uses_threshold(slot) and uses_topk(slot)
    run = _Run(
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
    cuda = _takes_cuda(slot, hidden, residual)
    rows = buffers.plan.rows
    for base in range(0, buffers.plan.num_chunks * rows, rows):
        (_compact_cuda if cuda else _compact)(run, base)
        (_encode_cuda if cuda else _encode)(run, base)
        if cuda and topk:
            _select_cuda(run, base)
        elif not cuda:
            _coefficients(run, base)
        if cuda:
            _decode_cuda(run, base)
        if not cuda or run.may_overflow:
            _combine(run, base, overflow_only=cuda)


@dataclass(frozen=True)
class _Run:
    """What the stages of one pipeline share."""

    slot: SAESlot
    step: StepState
    workspace: SteeringWorkspace
    buffers: StageBuffers
    hidden: torch.Tensor
    residual: torch.Tensor | None
    tier: Tier
    topk: bool
    gate: int

    @property
    def table(self) -> ClampTable:
        return self.slot.full if self.tier is Tier.FULL else self.slot.delta

    @property
    def index(self) -> torch.Tensor:
        return self.step.index[self.tier]

    @property
    def may_overflow(self) -> bool:
        """Whether a token may have more non-zeros than its list holds."""
        listed = self.tier is Tier.FULL
        return listed and self.buffers.plan.capacity < self.slot.weights.d_sae_capacity


def _compact_cuda(run: _Run, base: int) -> None:
    weights, workspace = run.slot.weights, run.workspace
    cuda_ops().compact(
        run.index,
        run.step.flags,
        run.table.packed,
        weights.meta,
        weights.norm_limit,
        run.hidden,
        run.residual,
        run.buffers.x,
        workspace.tokens,
        workspace.nnz,
        workspace.count,
        base,
        run.gate,
    )


def _encode_cuda(run: _Run, base: int) -> None:
    weights, workspace = run.slot.weights, run.workspace
    cuda_ops().encode(
        run.buffers.x,
        weights.W_enc,
        weights.b_enc,
        weights.threshold,
        workspace.count,
        workspace.nnz,
        run.buffers.scores if run.topk else run.buffers.entries,
        weights.W_dec if prefetches_decoder(run.buffers.plan.rows) else None,
        base,
    )


def _select_cuda(run: _Run, base: int) -> None:
    workspace = run.workspace
    cuda_ops().select(
        run.index,
        run.table.packed,
        run.slot.weights.meta,
        workspace.count,
        workspace.tokens,
        run.buffers.scores,
        workspace.nnz,
        run.buffers.entries,
        workspace.kth,
        run.buffers.coef,
        base,
    )


def _decode_cuda(run: _Run, base: int) -> None:
    weights, workspace = run.slot.weights, run.workspace
    cuda_ops().decode(
        run.index,
        run.table.packed,
        workspace.count,
        workspace.tokens,
        workspace.nnz,
        run.buffers.entries,
        run.buffers.coef,
        run.buffers.x,
        weights.W_dec,
        weights.b_dec,
        run.hidden,
        run.residual,
        base,
        run.topk,
        run.tier is Tier.DELTA,
        sorts_ahead(run.buffers.plan.rows),
    )


def _compact(run: _Run, base: int) -> None:
    slot, step, buffers, workspace = run.slot, run.step, run.buffers, run.workspace
    hidden, residual, table = run.hidden, run.residual, run.table
    weights = slot.weights
    tokens = hidden.shape[0]
    per_program = 1 if tokens <= 1024 else 16
    compact_kernel[(cdiv(tokens, per_program),)](
        run.index,
        step.flags,
        table.packed,
        weights.meta,
        weights.norm_limit,
        hidden,
        hidden if residual is None else residual,
        buffers.x,
        workspace.tokens,
        workspace.nnz,
        workspace.count,
        hidden.stride(0),
        0 if residual is None else residual.stride(0),
        table.packed.stride(0),
        tokens,
        base,
        buffers.plan.rows,
        D=weights.d_model,
        HAS_RESIDUAL=residual is not None,
        GATE=run.gate,
        PER_PROGRAM=per_program,
        SCAN=256 if tokens <= 256 else 1024,
        BLOCK_D=min(next_power_of_2(weights.d_model), 2048),
        num_warps=4,
        **_pdl(hidden.device),
    )


def _operands(
    slot: SAESlot, buffers: StageBuffers, plan: EncodePlan, tma: bool
) -> list[Any]:
    """x for the three token tiles, then W_enc: tensors, or descriptors for TMA."""
    tiles = (plan.token_tiles * 3)[:3] if len(plan.token_tiles) == 1 else None
    if tiles is None:
        tiles = (plan.token_tiles[0], plan.token_tiles[1], plan.token_tiles[-1])
    if not tma:
        return [buffers.x, buffers.x, buffers.x, slot.weights.W_enc, tiles]
    k = plan.block_k
    x = [TensorDescriptor.from_tensor(buffers.x, [tile, k]) for tile in tiles]
    w = TensorDescriptor.from_tensor(slot.weights.W_enc, [plan.block_f, k])
    return [*x, w, tiles]


def _encode(run: _Run, base: int) -> None:
    slot, buffers, workspace, topk = run.slot, run.buffers, run.workspace, run.topk
    weights = slot.weights
    item = weights.W_enc.element_size()
    rows = buffers.plan.rows
    plan = plan_encode(rows, item)
    multiprocessors, has_tma, _ = _device_facts(weights.W_enc.device)
    tma = has_tma and item == 2 and weights.d_model * item % 16 == 0
    *operands, tiles = _operands(slot, buffers, plan, tma)
    work = cdiv(weights.d_sae_capacity, plan.block_f) * cdiv(rows, tiles[-1])
    resident = multiprocessors * plan.programs_per_sm
    encode_kernel[(min(work, resident),)](
        *operands,
        weights.b_enc,
        weights.threshold,
        workspace.count,
        workspace.nnz,
        buffers.scores if topk else buffers.entries,
        base,
        rows,
        weights.d_sae_capacity,
        buffers.plan.capacity,
        D=weights.d_model,
        BF=plan.block_f,
        BK=plan.block_k,
        BT_NARROW=tiles[0],
        BT_MIDDLE=tiles[1],
        BT_WIDE=tiles[2],
        GROUP=max(TOKEN_GROUP_ROWS // tiles[2], 1),
        TMA=tma,
        DENSE=topk,
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
        **_pdl(weights.W_enc.device),
    )


def _coefficients(run: _Run, base: int) -> None:
    buffers, workspace, table, index = run.buffers, run.workspace, run.table, run.index
    weights = run.slot.weights
    device = weights.W_enc.device
    rows = buffers.plan.rows
    grid = (min(rows, _device_facts(device)[0] * 8),)
    clamp_block = min(next_power_of_2(table.max_clamps), 64)
    if run.topk:
        select_kernel[grid](
            index,
            table.packed,
            weights.meta,
            workspace.count,
            workspace.tokens,
            buffers.scores,
            workspace.nnz,
            buffers.entries,
            workspace.kth,
            buffers.coef,
            table.packed.stride(0),
            base,
            rows,
            weights.d_sae_capacity,
            buffers.plan.capacity,
            MAX_CLAMPS=table.max_clamps,
            CLAMP_BLOCK=clamp_block,
            BLOCK=2048,
            num_warps=8,
            **_pdl(device),
        )
        return
    resolve_kernel[grid](
        index,
        table.packed,
        workspace.count,
        workspace.tokens,
        workspace.nnz,
        buffers.entries,
        buffers.coef,
        table.packed.stride(0),
        base,
        rows,
        buffers.plan.capacity,
        MAX_CLAMPS=table.max_clamps,
        CLAMP_BLOCK=clamp_block,
        num_warps=4,
        **_pdl(device),
    )


def _combine(run: _Run, base: int, overflow_only: bool) -> None:
    buffers, workspace, table = run.buffers, run.workspace, run.table
    hidden, residual = run.hidden, run.residual
    weights = run.slot.weights
    rows = buffers.plan.rows
    block_d = min(next_power_of_2(weights.d_model), COMBINE_SLICE)
    work = rows * cdiv(weights.d_model, block_d)
    combine_kernel[(min(work, _device_facts(hidden.device)[0] * 12),)](
        run.index,
        table.packed,
        weights.meta,
        workspace.count,
        workspace.tokens,
        workspace.nnz,
        buffers.entries,
        workspace.kth,
        buffers.coef,
        buffers.x,
        buffers.scores,
        weights.W_enc,
        weights.b_enc,
        weights.threshold,
        weights.W_dec,
        weights.b_dec,
        hidden,
        hidden if residual is None else residual,
        hidden.stride(0),
        0 if residual is None else residual.stride(0),
        table.packed.stride(0),
        base,
        rows,
        weights.d_sae_capacity,
        buffers.plan.capacity,
        D=weights.d_model,
        HAS_RESIDUAL=residual is not None,
        MAX_CLAMPS=table.max_clamps,
        DELTA=run.tier is Tier.DELTA,
        TOPK=run.topk,
        OVERFLOW_ONLY=overflow_only,
        NB=COMBINE_ROWS,
        BD=block_d,
        num_warps=4,
        **_pdl(hidden.device),
    )


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
    slots, vector_slots = list(slots), list(vector_slots)
    for tokens in sizes:
        for slot in (*slots, *vector_slots):
            d_model = (
                slot.directions.shape[1]
                if isinstance(slot, VectorSlot)
                else slot.weights.d_model
            )
            shape = (tokens, d_model)
            hidden = torch.zeros(shape, dtype=dtype, device=step.index.device)
            for residual in (torch.zeros_like(hidden), None):
                if isinstance(slot, VectorSlot):
                    steering_vectors(slot, step, hidden, residual)
                else:
                    full_reconstruction(slot, step, workspace, hidden, residual)
                    sae_clamp(slot, step, workspace, hidden, residual)
