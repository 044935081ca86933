# SPDX-License-Identifier: Apache-2.0
"""The stages of full reconstruction in Triton: grids, block sizes, arguments."""

from __future__ import annotations

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from vllm.config.steering import Tier
from vllm.config.steering_json import Json
from vllm.model_executor.layers.steering_state import SAESlot, StepState, VectorSlot

from .clamp import clamp_kernel
from .combine import combine_kernel
from .compact import compact_kernel
from .encode import encode_kernel
from .plan import (
    LIST_MAX,
    EncodePlan,
    cdiv,
    next_power_of_2,
    plan_encode,
)
from .resolve import resolve_kernel
from .run import Run, device_facts, pdl_options, stream_arguments
from .select import select_kernel
from .stages_triton_dense import write_skip
from .workspace import StageBuffers

COMBINE_SLICE = 256  # columns of a decoder program
COMBINE_ROWS = 16  # rows of W_dec that it gathers at a time
TOKEN_GROUP_ROWS = 2048  # tokens whose activations the encoder keeps in L2


def compact(run: Run, base: int) -> None:
    slot, step, buffers, workspace = run.slot, run.step, run.buffers, run.workspace
    (hidden, residual), table = run.read, run.table
    weights = slot.weights
    tokens = hidden.shape[0]
    per_program = 1 if tokens <= 1024 else 16
    compact_kernel[(cdiv(tokens, per_program),)](
        index=run.index,
        flags=step.flags,
        table=table.packed,
        meta=weights.meta,
        norm_limit=weights.norm_limit,
        **stream_arguments(hidden, residual),
        x=buffers.x,
        tokens=workspace.tokens,
        records=workspace.records,
        sync=step.sync,
        count=workspace.count,
        table_stride=table.packed.stride(0),
        T=tokens,
        base=base,
        rows=buffers.plan.rows,
        D=weights.d_in,
        GATE=run.gate,
        PER_PROGRAM=per_program,
        SCAN=256 if tokens <= 256 else 1024,
        BLOCK_D=min(next_power_of_2(weights.d_in), 2048),
        num_warps=4,
        **pdl_options(hidden.device),
    )


def _operands(
    slot: SAESlot, buffers: StageBuffers, plan: EncodePlan, tma: bool
) -> tuple[Json, tuple[int, int, int]]:
    """x by token tile and W_enc, as tensors or TMA descriptors; and the tiles."""
    first, last = plan.token_tiles[0], plan.token_tiles[-1]
    middle = plan.token_tiles[1] if len(plan.token_tiles) > 1 else first
    tiles = (first, middle, last)
    names = ("x_narrow", "x_middle", "x_wide")
    if not tma:
        return {**dict.fromkeys(names, buffers.x), "w": slot.weights.W_enc}, tiles
    k = plan.block_k
    describe = TensorDescriptor.from_tensor
    x = {n: describe(buffers.x, [t, k]) for n, t in zip(names, tiles, strict=True)}
    return {**x, "w": describe(slot.weights.W_enc, [plan.block_f, k])}, tiles


def encode(run: Run, base: int) -> None:
    slot, buffers, workspace, topk = run.slot, run.buffers, run.workspace, run.topk
    weights = slot.weights
    item = weights.W_enc.element_size()
    rows = buffers.plan.rows
    plan = plan_encode(rows, item, weights.d_in)
    multiprocessors, has_tma, _ = device_facts(weights.W_enc.device)
    tma = has_tma and item == 2 and weights.d_in * item % 16 == 0
    operands, tiles = _operands(slot, buffers, plan, tma)
    features = weights.W_enc.shape[0]
    work = cdiv(features, plan.block_f) * cdiv(rows, tiles[-1])
    resident = multiprocessors * plan.programs_per_sm
    encode_kernel[(min(work, resident),)](
        **operands,
        b_enc=weights.b_enc,
        threshold=weights.threshold,
        count=workspace.count,
        records=workspace.records,
        out=run.encoded,
        base=base,
        rows=rows,
        F=features,
        capacity=buffers.plan.capacity,
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
    """Select the entries of TopK, or sort those of a threshold SAE; resolve clamps."""
    buffers, workspace, table = run.buffers, run.workspace, run.table
    weights = run.slot.weights
    device = weights.W_enc.device
    rows = buffers.plan.rows
    grid = (min(rows, device_facts(device)[0] * 8),)
    common: Json = {
        "index": run.index,
        "table": table.packed,
        "count": workspace.count,
        "tokens": run.tokens,
        "records": workspace.records,
        "sync": run.step.sync,
        "entries": buffers.entries,
        "coef": buffers.coef,
        "table_stride": table.packed.stride(0),
        "base": base,
        "rows": rows,
        "capacity": buffers.plan.capacity,
        "LIST_MAX": LIST_MAX,
        "MAX_CLAMPS": table.max_clamps,
        "CLAMP_BLOCK": min(next_power_of_2(table.max_clamps), 64),
        **pdl_options(device),
    }
    if not run.topk:
        resolve_kernel[grid](**common, num_warps=4)
        return
    select_kernel[grid](
        **common,
        meta=weights.meta,
        scores=buffers.scores,
        kth=workspace.kth,
        F=weights.d_sae_capacity,
        BLOCK=2048,
        num_warps=8,
    )


def combine(run: Run, base: int) -> None:
    buffers, workspace, table = run.buffers, run.workspace, run.table
    hidden, residual = run.hidden, run.residual
    weights = run.slot.weights
    rows = buffers.plan.rows
    if weights.W_skip is not None and run.tier is Tier.FULL:
        write_skip(run, weights.W_skip, base)
    # The blocks of a part of the columns are those of all, and so are its bits.
    block_d = min(next_power_of_2(weights.d_out), COMBINE_SLICE)
    work = rows * cdiv(run.d_out, block_d)
    combine_kernel[(min(work, device_facts(hidden.device)[0] * 12),)](
        index=run.index,
        table=table.packed,
        count=workspace.count,
        tokens=run.tokens,
        records=workspace.records,
        entries=buffers.entries,
        coef=buffers.coef,
        x=buffers.x,
        skip=buffers.skip,
        w_dec=weights.W_dec,
        b_dec=weights.b_dec,
        **stream_arguments(hidden, residual),
        saturated=run.saturated,
        table_stride=table.packed.stride(0),
        base=base,
        rows=rows,
        capacity=buffers.plan.capacity,
        LIST_MAX=LIST_MAX,
        D=run.d_out,
        MAX_CLAMPS=table.max_clamps,
        DELTA=run.tier is Tier.DELTA,
        HAS_SOURCE=run.source is not None,
        HAS_SKIP=weights.W_skip is not None,
        NB=COMBINE_ROWS,
        BD=block_d,
        num_warps=4,
        **pdl_options(hidden.device),
    )


def _clamp_launch(
    hidden: torch.Tensor, residual: torch.Tensor | None, source: torch.Tensor | None
) -> Json:
    """What both uses of the clamp kernel pass: streams and blocks."""
    d_model = hidden.shape[1]
    d_in = d_model if source is None else source.shape[1]
    row_d = next_power_of_2(d_model)
    return {
        **stream_arguments(hidden, residual),
        "source": hidden if source is None else source,
        "source_stride": 0 if source is None else source.stride(0),
        "D": d_model,
        "D_IN": d_in,
        "HAS_SOURCE": source is not None,
        "NC": 8,
        "BLOCK_D": min(next_power_of_2(d_in), 512),
        "ROW_D": row_d,
        "num_warps": 4 if row_d <= 1024 else 8,
        **pdl_options(hidden.device),
    }


def clamp(
    slot: SAESlot,
    step: StepState,
    gated: bool,
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    source: torch.Tensor | None,
) -> None:
    """The delta tier. With `gated`, a slot that holds a TopK module is skipped."""
    weights, table = slot.weights, slot.delta
    clamp_kernel[(hidden.shape[0],)](
        index=step.index[Tier.DELTA],
        flags=step.flags,
        table=table.packed,
        meta=weights.meta,
        norm_limit=weights.norm_limit,
        w_enc=weights.W_enc,
        b_enc=weights.b_enc,
        threshold=weights.threshold,
        w_dec=weights.W_dec,
        saturated=slot.saturated,
        table_stride=table.packed.stride(0),
        ENCODES=True,
        GATED=gated,
        MAX_CLAMPS=table.max_clamps,
        **_clamp_launch(hidden, residual, source),
    )


def add_vectors(
    slot: VectorSlot,
    step: StepState,
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
) -> None:
    """The additive tier."""
    table, directions = slot.table, slot.directions
    unused = step.flags  # an argument that the kernel does not read
    clamp_kernel[(hidden.shape[0],)](
        index=step.index[Tier.ADDITIVE],
        flags=unused,
        table=table.packed,
        meta=unused,
        norm_limit=unused,
        w_enc=unused,
        b_enc=unused,
        threshold=unused,
        w_dec=directions,
        saturated=slot.saturated,
        table_stride=table.packed.stride(0),
        ENCODES=False,
        GATED=False,
        MAX_CLAMPS=table.max_clamps,
        **_clamp_launch(hidden, residual, None),
    )
