# SPDX-License-Identifier: Apache-2.0
"""Bypass flags of a step's tokens: one small launch before the forward.

    flags[t] = skip_bits[token_ids[t]], 0 where the id is no token of the vocabulary

It also counts the tokens that have both a flag and a row of an SAE tier.

The ids are read on the device: under async scheduling the host does not know the tokens
that the previous step sampled.
"""

from __future__ import annotations

import torch

from vllm.config.steering import Tier
from vllm.model_executor.layers.steering_state import StepState
from vllm.triton_utils import tl, triton

BLOCK = 256


@triton.jit(do_not_specialize=["tokens"])
def flags_kernel(
    ids,
    bits,
    flags,
    delta_rows,
    full_rows,
    bypassed,
    tokens,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < tokens
    token = tl.load(ids + at, mask=inside, other=-1)
    known = (token >= 0) & (token < VOCAB)
    flag = tl.load(bits + token, mask=known, other=0)
    tl.store(flags + at, flag, mask=inside)
    row = tl.load(delta_rows + at, mask=inside, other=0)
    row |= tl.load(full_rows + at, mask=inside, other=0)
    count = tl.sum(((flag != 0) & (row != 0)).to(tl.int64))
    if count > 0:
        tl.atomic_add(bypassed, count)


def write_flags(step: StepState, token_ids: torch.Tensor) -> None:
    """Set `step.flags[:n]` from `token_ids [n]` (int32 or int64)."""
    n = token_ids.shape[0]
    vocab = step.skip_bits.shape[0]
    grid = (triton.cdiv(n, BLOCK),)
    flags_kernel[grid](
        ids=token_ids,
        bits=step.skip_bits,
        flags=step.flags,
        delta_rows=step.index[Tier.DELTA],
        full_rows=step.index[Tier.FULL],
        bypassed=step.bypassed,
        tokens=n,
        VOCAB=vocab,
        BLOCK=BLOCK,
    )


def warm_up_flags(step: StepState) -> None:
    """Compile for both widths of token ids."""
    for dtype in (torch.int32, torch.int64):
        write_flags(step, torch.zeros(1, dtype=dtype, device=step.flags.device))
