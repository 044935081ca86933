# SPDX-License-Identifier: Apache-2.0
"""Fold a norm's gain into an encoder that was trained before it.

Some transcoders read the normalised stream `n` before the norm's gain, such as Gemma
Scope's (`ln2.hook_normalized` in TransformerLens). The MLP reads `g * n + b`. So the
same encoder on `mlp_in` has `W_enc / g` and `b_enc - (W_enc / g) b`; `W_skip` and
`b_dec` change in the same way.
"""

from __future__ import annotations

import torch
from torch import nn

from vllm.model_executor.layers.steering_attach import SteeredNorm
from vllm.model_executor.layers.steering_chunks import (
    ChunkMemory,
    chunk_rows,
    row_sums,
)
from vllm.model_executor.layers.steering_state import SAEWeights

# Large enough that the norm's epsilon does not count, exact in every dtype.
_PROBE = 64.0


def norm_gain(norm: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gain and bias of a norm, float32 `[D]`; the bias may be None.

    Some norms multiply by their weight, others by the weight plus one. The norm's
    output for a vector of plus and minus ones (mean 0, mean square 1) shows which.

    Raises:
        ValueError: it is neither, or has no weight.
    """
    parameters = dict(norm.named_parameters(recurse=False))
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if weight is None:
        raise ValueError(f"steering: {type(norm).__name__} has no weight to divide by")
    probe = torch.full_like(weight, _PROBE)
    probe[1::2] *= -1
    with torch.no_grad():
        sign = probe.sign().float()
        plus, minus = (_stock_norm(norm, s * probe) for s in (1, -1))
    found = (plus - minus) / 2 * sign
    exact = weight.detach().float()
    tolerance = 4 * torch.finfo(weight.dtype).eps
    for gain in (exact, exact + 1):
        if torch.allclose(found, gain, rtol=tolerance, atol=tolerance):
            return gain, None if bias is None else bias.detach().float()
    raise ValueError(
        f"steering: {type(norm).__name__} multiplies neither by its weight nor by "
        "1 + weight, so its gain cannot be divided out"
    )


def _stock_norm(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The norm's output for one token, in float32, without a site at the norm."""
    kind: type[nn.Module] = type(norm)
    if isinstance(norm, SteeredNorm):
        # The class of a steered norm inherits from its marker and from the stock class.
        kind = kind.__mro__[kind.__mro__.index(SteeredNorm) + 1]
    return kind.forward(norm, x[None])[0].float()


@torch.no_grad()
def fold_norm_gain(weights: SAEWeights, d_sae: int, norm: nn.Module | None) -> None:
    """Change an encoder of the norm's output before its gain to read it after the gain.

    Args:
        weights: filled with such an SAE of `d_sae` features.
        norm: the norm before the MLP.

    Raises:
        ValueError: there is no norm, or a gain is zero or too small to divide by.
    """
    if norm is None:
        raise ValueError(
            "steering: a module that reads a norm's output before its gain needs a "
            "layer with a norm before the MLP"
        )
    gain, bias = norm_gain(norm)
    fold_into(weights.W_enc[:d_sae], weights.b_enc[:d_sae], gain, bias, norm)
    if weights.W_skip is not None:
        fold_into(weights.W_skip, weights.b_dec, gain, bias, norm)


def fold_into(
    matrix: torch.Tensor,
    added: torch.Tensor,
    gain: torch.Tensor,
    bias: torch.Tensor | None,
    part: nn.Module,
) -> None:
    """Change `matrix n + added`, in place, to read `gain * n + bias` of a layer's part.

    A chunk of rows at a time: a wide encoder in float32 is larger than the SAE.
    """
    device, step = matrix.device, chunk_rows(matrix.shape[1])
    gain = gain.to(device)
    memory = ChunkMemory(matrix[:step].numel(), device)
    for rows, sums in zip(matrix.split(step), added.split(step), strict=True):
        folded = memory.work(rows)
        folded /= gain
        rows.copy_(folded)
        # Both are NaN if any element is.
        if not torch.isfinite(torch.stack(torch.aminmax(rows))).all():
            raise ValueError(
                f"steering: a gain of {type(part).__name__} is too small to be "
                "divided out"
            )
        if bias is not None:
            folded.copy_(rows)
            folded *= bias.to(device)
            sums -= row_sums(folded)
