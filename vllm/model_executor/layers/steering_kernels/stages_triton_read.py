# SPDX-License-Identifier: Apache-2.0
"""The launch of the Triton kernel that reads features."""

from __future__ import annotations

import torch

from vllm.model_executor.layers.steering_read_state import ReadBuffers

from .plan import LEAST_REDUCTION, plan_encode
from .readout import readout_kernel
from .run import Run, device_facts, pdl_options


def read_out(
    run: Run,
    reads: ReadBuffers,
    base: int,
    overflow: bool,
    part: torch.Tensor | None = None,
) -> None:
    """Write the rows of a chunk's read tokens to `reads.out`.

    Args:
        run: the pipeline, of whose stages only those up to the encoder have run, and
            for TopK the selection.
        reads: the reading table.
        base: the first token of the chunk.
        overflow: after the extension's stages, and only tokens with more non-zeros
            than their list holds; the decoder reads the others.
        part: int32 `[T, reads.width]`, written instead: the rows of the features that
            this rank encodes, counted from its first.
    """
    weights, workspace, buffers = run.slot.weights, run.workspace, run.buffers
    plan = buffers.plan
    device = weights.W_enc.device
    # The narrowest tile: a token is encoded again alone.
    encoder = plan_encode(1, weights.W_enc.element_size(), weights.d_in)
    # A list that may overflow holds the best keys and a block of features.
    least = reads.max_read + encoder.block_f
    if plan.capacity < min(least, weights.d_sae_capacity):
        raise ValueError(
            f"steering: lists of {plan.capacity} non-zeros, reading needs {least}"
        )
    out, own = reads.out, slice(0, weights.d_sae_capacity)
    if part is not None:
        out, own = part, weights.own
    # The extension notes a token's id in its record, Triton's stages beside it.
    tokens = workspace.records[:, 1] if overflow else workspace.tokens
    readout_kernel[(min(plan.rows, device_facts(device)[0] * 8),)](
        index=run.step.read_index,
        table=reads.packed,
        scale=reads.scale[own],
        out=out,
        meta=weights.meta,
        count=workspace.count,
        tokens=tokens,
        records=workspace.records,
        entries=buffers.entries,
        kth=workspace.kth,
        x=buffers.x,
        scores_of=buffers.scores,
        w_enc=weights.W_enc,
        b_enc=weights.b_enc,
        threshold=weights.threshold,
        table_stride=reads.packed.stride(0),
        out_stride=out.stride(0),
        tokens_stride=tokens.stride(0),
        base=base,
        rows=plan.rows,
        F=own.stop - own.start,
        capacity=plan.capacity,
        first_feature=own.start,
        D=weights.d_in,
        GATE=run.gate,
        TOPK=run.topk,
        OVERFLOW=overflow,
        BF=encoder.block_f,
        # The extension's blocks of columns are the narrow ones.
        BK=LEAST_REDUCTION if overflow else encoder.block_k,
        num_warps=encoder.num_warps,
        **pdl_options(device),
    )
