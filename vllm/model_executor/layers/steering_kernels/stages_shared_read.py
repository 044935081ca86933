# SPDX-License-Identifier: Apache-2.0
"""The stages that read features of an SAE that tensor-parallel ranks share.

With a threshold activation, each rank reads its own features, and the ranks exchange
what they have read: a row of 520 bytes for each token. TopK needs the scores of all
features first, and with these each rank reads as one rank does.
"""

from __future__ import annotations

import torch

from vllm.config.sae_features import NOT_READ
from vllm.config.sae_readout_specs import MAX_READ
from vllm.model_executor.layers.steering_read_state import OUT_WIDTH, ReadBuffers

from . import stages_triton
from .plan import next_power_of_2
from .run import Run, device_facts
from .shared_read import merge_reads_kernel
from .stages_shared import Gather, exchange_scores, peers_of
from .stages_triton_read import read_out


def pipeline(run: Run, reads: ReadBuffers) -> None:
    """All stages, chunk after chunk; all ranks call it together."""
    plan, part = run.buffers.plan, None
    tokens = run.hidden.shape[0]
    gather = Gather(
        run.slot.weights.shard, peers_of(run.slot, run.workspace), run.workspace.count
    )
    if not run.topk:
        part = gather.room(tokens, OUT_WIDTH, torch.int32)
        part.fill_(NOT_READ)
    for base in range(0, plan.num_chunks * plan.rows, plan.rows):
        stages_triton.compact(run, base)
        if run.topk:
            exchange_scores(run, base)
            stages_triton.coefficients(run, base)
        else:
            stages_triton.encode(run, base)
        read_out(run, reads, base, overflow=False, part=part)
    if part is not None:
        _merge(run, reads, gather(part, NOT_READ))


def _merge(run: Run, reads: ReadBuffers, parts: torch.Tensor) -> None:
    """Write `reads.out` from the rows `[size, T, OUT_WIDTH]` of all ranks."""
    size, tokens, _ = parts.shape
    device = parts.device
    keys = torch.empty(tokens, size * MAX_READ, dtype=torch.int64, device=device)
    merge_reads_kernel[(min(tokens, device_facts(device)[0] * 8),)](
        index=run.step.read_index,
        table=reads.packed,
        parts=parts,
        keys=keys,
        out=reads.out,
        table_stride=reads.packed.stride(0),
        out_stride=reads.out.stride(0),
        T=tokens,
        held=run.slot.weights.W_enc.shape[0],
        RANKS=size,
        N=next_power_of_2(size * MAX_READ),
        num_warps=4,
    )
