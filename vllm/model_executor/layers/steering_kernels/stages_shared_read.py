# SPDX-License-Identifier: Apache-2.0
"""The stages that read features of an SAE that tensor-parallel ranks share.

With a threshold activation, each rank reads its own features, and the ranks exchange
what they have read: a row for each token, of 520 bytes unless requests may read more
(`ReadBuffers.width`). TopK needs the scores of all
features first, and with these each rank reads as one rank does.
"""

from __future__ import annotations

import torch

from vllm.config.sae_features import NOT_READ
from vllm.model_executor.layers.steering_read_state import ReadBuffers

from . import stages_triton
from .plan import next_power_of_2
from .run import Run, device_facts
from .shared_read import merge_reads_kernel
from .stages_shared import Gather, exchange_scores, peers_of
from .stages_triton_read import read_out

MERGED_KEYS = 8 << 20  # 64 MiB of keys, and as much of gathered rows


def pipeline(run: Run, reads: ReadBuffers) -> None:
    """All stages, chunk after chunk; all ranks call it together."""
    plan, part = run.buffers.plan, None
    tokens = run.hidden.shape[0]
    gather = Gather(
        run.slot.weights.shard, peers_of(run.slot, run.workspace), run.workspace.count
    )
    at_once = merged_at_once(run.slot.weights.shard.size, reads.max_read)
    if not run.topk:
        device = run.hidden.device
        if tokens <= at_once:
            part = gather.room(tokens, reads.width, torch.int32)
        else:
            part = torch.empty(tokens, reads.width, dtype=torch.int32, device=device)
        part.fill_(NOT_READ)
    for base in range(0, plan.num_chunks * plan.rows, plan.rows):
        stages_triton.compact(run, base)
        if run.topk:
            exchange_scores(run, base)
            stages_triton.coefficients(run, base)
        else:
            stages_triton.encode(run, base)
        read_out(run, reads, base, overflow=False, part=part)
    if part is None:
        return
    if tokens <= at_once:
        _merge(run, reads, gather(part, NOT_READ), 0)
        return
    for first in range(0, tokens, at_once):
        rows = part[first : first + at_once]
        own = gather.room(len(rows), reads.width, torch.int32)
        own.copy_(rows)
        _merge(run, reads, gather(own, NOT_READ), first)


def merged_at_once(size: int, max_read: int) -> int:
    """Tokens whose rows `size` ranks join at a time, so that scratch is bounded."""
    return max(MERGED_KEYS // (size * max_read), 1)


def _merge(run: Run, reads: ReadBuffers, parts: torch.Tensor, first: int) -> None:
    """Write `reads.out` from the rows `[size, T, width]` of all ranks.

    `first`: the first of these T tokens of the step.
    """
    size, tokens, width = parts.shape
    device = parts.device
    max_read = next_power_of_2(reads.max_read)
    keys = torch.empty(tokens, size * max_read, dtype=torch.int64, device=device)
    merge_reads_kernel[(min(tokens, device_facts(device)[0] * 8),)](
        index=run.step.read_index[first : first + tokens],
        table=reads.packed,
        parts=parts,
        keys=keys,
        out=reads.out[first : first + tokens],
        table_stride=reads.packed.stride(0),
        out_stride=reads.out.stride(0),
        T=tokens,
        held=run.slot.weights.W_enc.shape[0],
        RANKS=size,
        MAX_READ=max_read,
        OUT_ROW=width,
        N=next_power_of_2(size * max_read),
        num_warps=4,
    )
