# SPDX-License-Identifier: Apache-2.0
"""Fold the bias of attention's values into an SAE that was trained without it.

The weights of attention add up to one for each token, so `attn_z` is `z + b`, where `z`
has no bias and `b` is that of the values, of all heads. TransformerLens can move `b`
behind the output projection (`fold_value_biases`), and its `hook_z` is then `z`. The
same SAE on `z + b` has `b_enc - W_enc b` and `b_dec + b`.
"""

from __future__ import annotations

import torch
from torch import nn

from vllm.model_executor.layers.linear import QKVParallelLinear
from vllm.model_executor.layers.steering_families import class_name
from vllm.model_executor.layers.steering_norms import fold_into
from vllm.model_executor.layers.steering_state import SAEWeights


def value_bias(attention: nn.Module | None) -> torch.Tensor | None:
    """The bias of an attention module's values, float32 `[heads * head_dim]`, or None.

    Raises:
        ValueError: no projection of queries, keys and values is known there.
    """
    parts = () if attention is None else attention.modules()
    found = [part for part in parts if isinstance(part, QKVParallelLinear)]
    if len(found) != 1:
        where = "the layer" if attention is None else class_name(attention)
        raise ValueError(
            "steering: a module that reads attn_z before the bias of the values needs "
            f"a layer with one projection of queries, keys and values, found "
            f"{len(found)} in {where}"
        )
    (projection,) = found
    if projection.bias is None:
        return None
    heads, size = projection.num_kv_heads, projection.v_head_size
    values = projection.bias.detach()[-heads * size :].float().view(heads, size)
    return values.repeat_interleave(projection.num_heads // heads, dim=0).flatten()


@torch.no_grad()
def fold_value_bias(
    weights: SAEWeights, d_sae: int, attention: nn.Module | None
) -> None:
    """Change an SAE of `attn_z` without the values' bias to one of `attn_z`.

    Args:
        weights: filled with such an SAE of `d_sae` features.
        attention: the layer's attention module.

    Raises:
        ValueError: as `value_bias`.
    """
    bias = value_bias(attention)
    if bias is None:
        return
    assert attention is not None
    W_enc, b_enc = weights.W_enc[:d_sae], weights.b_enc[:d_sae]
    fold_into(W_enc, b_enc, torch.ones_like(bias), bias, attention)
    weights.b_dec += bias.to(weights.b_dec.device)
