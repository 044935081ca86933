# SPDX-License-Identifier: Apache-2.0
"""The tensors of reading: which rows read what at a slot, and what a step has read."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from vllm.config.sae_features import NOT_READ
from vllm.config.sae_readout_specs import MAX_READ

# Columns of a table row before its features: active, 0 (clamps: none), top_k, count.
TABLE_HEAD = 4
# A row of `ReadBuffers.out`: num_active, num_listed, then at most MAX_READ values and
# as many features.
OUT_WIDTH = 2 + 2 * MAX_READ


class ReadBuffers(nn.Module):
    """The reading state of one slot: the rows of requests and the results of a step.

    The table has the shape of a `ClampTable` with `max_clamps` clamps. Columns 0 and 1
    mean "active" and "no clamps" in both, so the stages that find and encode the active
    tokens take either.

    Buffers:
        packed: int32 `[R, 2 + 3K]`: active, 0, top_k, count, then `count` feature
            indices, ascending. Row 0 is all zeros: not read.
        out: int32 `[max_tokens, 130]`, rows as `vllm.config.sae_features` has them;
            a token that was not read has -1 in column 0.
        scale: float32 `[F]`, what a native activation is multiplied by.
    """

    packed: torch.Tensor
    out: torch.Tensor
    scale: torch.Tensor

    def __init__(
        self,
        num_rows: int,
        max_clamps: int,
        max_tokens: int,
        d_sae: int,
        device: torch.device,
    ):
        super().__init__()
        self.max_clamps = max_clamps
        i32 = torch.int32
        table = torch.zeros(num_rows, 2 + 3 * max_clamps, dtype=i32, device=device)
        self.register_buffer("packed", table, persistent=False)
        out = torch.full((max_tokens, OUT_WIDTH), NOT_READ, dtype=i32, device=device)
        self.register_buffer("out", out, persistent=False)
        scale = torch.ones(d_sae, device=device)
        self.register_buffer("scale", scale, persistent=False)

    def set_scale(self, decoder_norms: np.ndarray | None) -> None:
        """Return activations in units of unit-norm decoder rows; native ones if None.

        Args:
            decoder_norms: float32 `[<= F]`, what the units are: `f * norm`.
        """
        self.scale.fill_(1.0)
        if decoder_norms is not None:
            self.scale[: len(decoder_norms)].copy_(torch.from_numpy(decoder_norms))
