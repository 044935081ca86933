# SPDX-License-Identifier: Apache-2.0
"""Launches of the Triton stages that multiply dense tiles: dense tokens, and the skip
connection of transcoders."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vllm.config.steering import Tier

from .dense import decode_dense_kernel, encode_dense_kernel
from .plan import cdiv, plan_dense
from .run import Run, device_facts, pdl_options, stream_arguments
from .skip import skip_kernel


def encode_own(run: Run, first: int, rows: int) -> None:
    """The activations of dense tokens, of an encoder that this rank holds whole."""
    encode_dense(run, first, rows, dense_acts(run))


def dense(run: Run, encode: Callable[[Run, int, int], None] = encode_own) -> None:
    """Reconstruct the dense tokens of a chunk, `dense_rows` at a time.

    `encode` writes `dense_acts` of so many tokens, from a place on.
    """
    if run.tier is Tier.DELTA or run.buffers.plan.dense_rows == 0:
        return
    plan = run.buffers.plan
    rows = plan.rows if run.topk else plan.dense_rows
    for first in range(0, plan.rows, rows):
        if not run.topk:
            encode(run, first, rows)
        decode_dense(run, first, rows)


def dense_acts(run: Run) -> torch.Tensor:
    """float32 activations of a chunk of dense tokens; for TopK the scores."""
    if run.topk:
        return run.buffers.scores
    return run.buffers.dense.view(torch.float32)


def encode_dense(run: Run, first: int, rows: int, acts: torch.Tensor) -> None:
    """Write the activations of a chunk of dense tokens: float32, a row each."""
    weights = run.slot.weights
    blocks = plan_dense(weights.W_enc.element_size())
    device = weights.W_enc.device
    features = weights.W_enc.shape[0]
    work = cdiv(rows, blocks.tokens) * cdiv(features, blocks.features)
    encode_dense_kernel[(min(work, 2 * device_facts(device)[0]),)](
        x=run.buffers.x,
        w_enc=weights.W_enc,
        b_enc=weights.b_enc,
        threshold=weights.threshold,
        records=run.workspace.records,
        sync=run.step.sync,
        acts=acts,
        acts_stride=acts.stride(0),
        base=first,
        rows=rows,
        F=features,
        D=weights.d_in,
        BT=blocks.tokens,
        BF=blocks.features,
        BK=blocks.reduction,
        num_warps=4,
        **pdl_options(device),
    )


def decode_dense(run: Run, first: int, rows: int) -> None:
    """Reconstruct a chunk of dense tokens from `dense_acts`."""
    weights, acts = run.slot.weights, dense_acts(run)
    hidden, residual, table = run.hidden, run.residual, run.table
    blocks = plan_dense(weights.W_dec.element_size())
    work = cdiv(rows, blocks.tokens) * cdiv(run.d_out, blocks.columns)
    decode_dense_kernel[(min(work, 2 * device_facts(hidden.device)[0]),)](
        index=run.index,
        table=table.packed,
        meta=weights.meta,
        tokens=run.tokens,
        records=run.workspace.records,
        sync=run.step.sync,
        kth=run.workspace.kth,
        coef=run.buffers.coef,
        acts=acts,
        skip=run.buffers.skip,
        w_dec=weights.W_dec,
        b_dec=weights.b_dec,
        **stream_arguments(hidden, residual),
        saturated=run.saturated,
        acts_stride=acts.stride(0),
        table_stride=table.packed.stride(0),
        base=first,
        rows=rows,
        D=run.d_out,
        MAX_CLAMPS=table.max_clamps,
        TOPK=run.topk,
        HAS_SKIP=weights.W_skip is not None,
        BT=blocks.tokens,
        BF=blocks.reduction,
        BD=blocks.columns,
        num_warps=4,
        **pdl_options(hidden.device),
    )


def write_skip(run: Run, w_skip: torch.Tensor, base: int) -> None:
    """Write `b_dec + W_skip x` of a chunk, to which the decoder adds."""
    weights, rows = run.slot.weights, run.buffers.plan.rows
    blocks = plan_dense(w_skip.element_size())
    work = cdiv(rows, blocks.tokens) * cdiv(run.d_out, blocks.columns)
    skip_kernel[(min(work, 2 * device_facts(w_skip.device)[0]),)](
        x=run.buffers.x,
        w_skip=w_skip,
        b_dec=weights.b_dec,
        count=run.workspace.count,
        out=run.buffers.skip,
        base=base,
        rows=rows,
        D_IN=weights.d_in,
        D_OUT=run.d_out,
        BT=blocks.tokens,
        BD=blocks.columns,
        BK=blocks.reduction,
        num_warps=4,
        **pdl_options(w_skip.device),
    )
