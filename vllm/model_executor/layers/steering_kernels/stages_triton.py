# SPDX-License-Identifier: Apache-2.0
"""The stages of full reconstruction in Triton: grids, block sizes, arguments."""

from __future__ import annotations

from typing import Any

from triton.tools.tensor_descriptor import TensorDescriptor

from vllm.config.steering import Tier
from vllm.model_executor.layers.steering_state import SAESlot

from .combine import combine_kernel
from .compact import compact_kernel
from .encode import encode_kernel
from .plan import EncodePlan, cdiv, next_power_of_2, plan_encode
from .resolve import resolve_kernel
from .run import Run, device_facts, pdl_options
from .select import select_kernel
from .workspace import StageBuffers

COMBINE_SLICE = 256  # columns of a decoder program
COMBINE_ROWS = 16  # rows of W_dec that it gathers at a time
TOKEN_GROUP_ROWS = 2048  # tokens whose activations the encoder keeps in L2


def compact(run: Run, base: int) -> None:
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
        D=weights.d_in,
        HAS_RESIDUAL=residual is not None,
        GATE=run.gate,
        PER_PROGRAM=per_program,
        SCAN=256 if tokens <= 256 else 1024,
        BLOCK_D=min(next_power_of_2(weights.d_in), 2048),
        num_warps=4,
        **pdl_options(hidden.device),
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


def encode(run: Run, base: int) -> None:
    slot, buffers, workspace, topk = run.slot, run.buffers, run.workspace, run.topk
    weights = slot.weights
    item = weights.W_enc.element_size()
    rows = buffers.plan.rows
    plan = plan_encode(rows, item)
    multiprocessors, has_tma, _ = device_facts(weights.W_enc.device)
    tma = has_tma and item == 2 and weights.d_in * item % 16 == 0
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
        D=weights.d_in,
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
        **pdl_options(weights.W_enc.device),
    )


def coefficients(run: Run, base: int) -> None:
    buffers, workspace, table, index = run.buffers, run.workspace, run.table, run.index
    weights = run.slot.weights
    device = weights.W_enc.device
    rows = buffers.plan.rows
    grid = (min(rows, device_facts(device)[0] * 8),)
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
            **pdl_options(device),
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
        **pdl_options(device),
    )


def combine(run: Run, base: int) -> None:
    buffers, workspace, table = run.buffers, run.workspace, run.table
    hidden, residual = run.hidden, run.residual
    weights = run.slot.weights
    rows = buffers.plan.rows
    block_d = min(next_power_of_2(weights.d_in), COMBINE_SLICE)
    work = rows * cdiv(weights.d_in, block_d)
    combine_kernel[(min(work, device_facts(hidden.device)[0] * 12),)](
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
        D=weights.d_in,
        HAS_RESIDUAL=residual is not None,
        MAX_CLAMPS=table.max_clamps,
        DELTA=run.tier is Tier.DELTA,
        TOPK=run.topk,
        NB=COMBINE_ROWS,
        BD=block_d,
        num_warps=4,
        **pdl_options(hidden.device),
    )
