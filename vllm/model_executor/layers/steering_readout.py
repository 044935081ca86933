# SPDX-License-Identifier: Apache-2.0
"""Reading features at a site: the definition in plain PyTorch, used on a CPU.

A token is read if its row of `StepState.read_index` is active in the slot's table and
the module does not bypass the token. The stream does not change.
"""

from __future__ import annotations

import torch

from vllm.model_executor.layers import steering_reference as reference
from vllm.model_executor.layers.steering_read_state import ReadBuffers
from vllm.model_executor.layers.steering_state import MetaField, SAESlot, StepState
from vllm.model_executor.layers.steering_stream import Stream


def read_features(
    slot: SAESlot,
    step: StepState,
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
) -> None:
    """Write the rows of the step's read tokens to `slot.reads.out`."""
    reads, weights = slot.reads, slot.weights
    if reads is None:
        return
    index = step.read_index[: hidden.shape[0]].long()
    mask = weights.meta[MetaField.SKIP_MASK]
    active = reads.packed[index, 0] != 0
    active &= (step.flags[: hidden.shape[0]] & mask) == 0
    for tokens in active.nonzero().squeeze(1).split(reference.TOKEN_SLICE):
        if not tokens.numel():
            continue
        x = Stream(hidden, residual).gather(tokens)
        x = x.to(torch.promote_types(weights.W_enc.dtype, torch.float32))
        # Before the norms are looked at: ranks that share the SAE exchange activations.
        acts = reference.encode(weights, x)
        keep = reference.within_norm(x, weights.norm_limit)
        tokens, acts = tokens[keep], acts[keep]
        write_rows(reads, index[tokens], tokens, acts)


def write_rows(
    reads: ReadBuffers, rows: torch.Tensor, tokens: torch.Tensor, acts: torch.Tensor
) -> None:
    """Write the activations that the tokens' rows ask for.

    Args:
        rows, tokens: int64 `[n]`.
        acts: `[n, F]`, native activations.
    """
    values = (acts * reads.scale.to(acts.dtype)).to(torch.float32)
    active = acts != 0
    for row in rows.unique().tolist():
        own = rows == row
        _, _, top_k, count, *features = reads.packed[row].tolist()
        found = values[own]
        out = reads.out.new_zeros(found.shape[0], reads.out.shape[1])
        out[:, 0] = active[own].sum(dim=1)
        bits = out.view(torch.float32)
        if count:
            bits[:, 2 : 2 + count] = found[:, features[:count]]
        if top_k:
            listed = torch.where(active[own], found, -torch.inf)
            order = listed.sort(dim=1, descending=True, stable=True)
            n = min(top_k, found.shape[1])
            first = 2 + count
            out[:, 1] = out[:, 0].clamp(max=n)
            out[:, first : first + n] = order.indices[:, :n]
            bits[:, first + top_k : first + top_k + n] = order.values[:, :n]
        reads.out[tokens[own]] = out
