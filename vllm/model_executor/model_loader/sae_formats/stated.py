# SPDX-License-Identifier: Apache-2.0
"""Hold what a configuration states against the tensors beside it."""

from __future__ import annotations

import math

from vllm.model_executor.model_loader.sae_formats.layout import (
    Fields,
    LayoutError,
    SAELayout,
)
from vllm.model_executor.model_loader.sae_formats.tensor_files import read_array
from vllm.model_executor.model_loader.sae_formats.tensor_types import (
    TensorFile,
    as_float32,
)


def need_k(fields: Fields, d_sae: int, tensors: TensorFile) -> int:
    """TopK's `k` from the configuration. If the weights state it too, it must be equal.

    Raises:
        LayoutError: absent, more than the features, or the two differ.
    """
    k = fields.need_integer("k", 1)
    if k > d_sae:
        raise fields.fail("k", f"at most {d_sae}")
    if (info := tensors.infos.get("k")) is not None and math.prod(info.shape) == 1:
        stored = _number(tensors, "k")
        if stored != k:
            raise fields.fail("k", f"{stored:g}, which {tensors.label} has for k")
    return k


def _number(tensors: TensorFile, name: str) -> float:
    """A tensor of one number, an integer or floating."""
    value, dtype = read_array(tensors, name, 0, 1), tensors.infos[name].dtype
    return (value if dtype is None else as_float32(value, dtype)).item()


# What an SAE computes besides its two matrices and biases: tensors of any format.
_CHANGES = frozenset(
    ("threshold", "log_threshold", "topk_threshold", "W_skip", "r_mag", "b_mag")
    + ("b_gate", "mag_bias", "gate_bias")
)


def refuse_unused(layout: SAELayout, tensors: TensorFile, stated: str) -> None:
    """Refuse tensors that would change what the SAE computes and that are not read.

    Args:
        stated: what the configuration says, by which they are not.

    Raises:
        LayoutError: the weights are of another kind than the configuration says.
    """
    used: set[object] = {layout.threshold}
    if layout.W_skip is not None:
        used.add(layout.W_skip.name)
    if layout.gate is not None:
        used |= {layout.gate.r_mag, layout.gate.b_mag, layout.gate.b_gate}
    if left := sorted((_CHANGES & tensors.infos.keys()) - used):
        raise LayoutError(
            f"{tensors.label}: {left[0]}: expected no such tensor, since {stated}"
        )
