# SPDX-License-Identifier: Apache-2.0
"""Bypass flags of a step's tokens: one small launch before the forward.

    flags[t] = skip_bits[token_ids[t]], 0 where the id is no token of the vocabulary

It also counts for each module the tokens that it leaves alone (`BypassCounts`). A step
without such a token does not look at any module.

The ids are read on the device: under async scheduling the host does not know the tokens
that the previous step sampled.
"""

from __future__ import annotations

import torch

from vllm.config.steering import Tier
from vllm.model_executor.layers.steering_state import StepState
from vllm.triton_utils import tl, triton

BLOCK = 256
SLOTS = 8  # slots of a module that are looked at together


@triton.jit
def edited_tokens(tables, first, last, held, delta_row, full_row, stride,
                  BLOCK: tl.constexpr, SLOTS: tl.constexpr):  # fmt: skip
    """1 for each of the `held` tokens whose row edits in one of the module's slots."""
    edited = tl.zeros([BLOCK], tl.int32)
    for start in range(first, last, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        there = slot < last
        mask = held[:, None] & there[None, :]
        address = tl.load(tables + 2 * slot, mask=there, other=0)
        delta = address.to(tl.pointer_type(tl.int32))
        address = tl.load(tables + 2 * slot + 1, mask=there, other=0)
        full = address.to(tl.pointer_type(tl.int32))
        at = delta_row[:, None] * stride
        on = tl.load(delta[None, :] + at, mask=mask, other=0)
        at = full_row[:, None] * stride
        on |= tl.load(full[None, :] + at, mask=mask, other=0)
        edited |= tl.max((on != 0).to(tl.int32), 1)
    return edited


@triton.jit(do_not_specialize=["tokens", "modules", "stride"])
def flags_kernel(
    ids,
    bits,
    flags,
    delta_rows,
    full_rows,
    tables,
    starts,
    masks,
    counts,
    tokens,
    modules,
    stride,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < tokens
    token = tl.load(ids + at, mask=inside, other=-1)
    known = (token >= 0) & (token < VOCAB)
    flag = tl.load(bits + token, mask=known, other=0)
    tl.store(flags + at, flag, mask=inside)
    delta_row = tl.load(delta_rows + at, mask=inside, other=0).to(tl.int64)
    full_row = tl.load(full_rows + at, mask=inside, other=0).to(tl.int64)
    bypassed = (flag != 0) & ((delta_row | full_row) != 0)
    if tl.max(bypassed.to(tl.int32), 0) > 0:
        for module in range(modules):
            held = bypassed & ((flag & tl.load(masks + module)) != 0)
            edited = edited_tokens(
                tables=tables, first=tl.load(starts + module),
                last=tl.load(starts + module + 1), held=held, delta_row=delta_row,
                full_row=full_row, stride=stride, BLOCK=BLOCK, SLOTS=SLOTS,
            )  # fmt: skip
            count = tl.sum(edited.to(tl.int64), 0)
            if count > 0:
                tl.atomic_add(counts + module, count)


def write_flags(step: StepState, token_ids: torch.Tensor) -> None:
    """Set `step.flags[:n]` from `token_ids [n]` (int32 or int64), and count."""
    n = token_ids.shape[0]
    bypass = step.bypass
    flags_kernel[(triton.cdiv(n, BLOCK),)](
        ids=token_ids,
        bits=step.skip_bits,
        flags=step.flags,
        delta_rows=step.index[Tier.DELTA],
        full_rows=step.index[Tier.FULL],
        tables=bypass.tables,
        starts=bypass.starts,
        masks=bypass.masks,
        counts=bypass.counts,
        tokens=n,
        modules=len(bypass.modules),
        stride=bypass.stride,
        VOCAB=step.skip_bits.shape[0],
        BLOCK=BLOCK,
        SLOTS=SLOTS,
    )


def warm_up_flags(step: StepState) -> None:
    """Compile for both widths of token ids."""
    for dtype in (torch.int32, torch.int64):
        write_flags(step, torch.zeros(1, dtype=dtype, device=step.flags.device))
