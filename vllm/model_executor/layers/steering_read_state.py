# SPDX-License-Identifier: Apache-2.0
"""The tensors of reading: which rows read what at a slot, and what a step has read."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from vllm.config.sae_features import NOT_READ
from vllm.config.steering import DEFAULT_MAX_READ_VALUES

# Columns of a table row before its features: active, 0 (clamps: none), top_k, count.
TABLE_HEAD = 4


class ReadBuffers(nn.Module):
    """The reading state of one slot: the rows of requests and the results of a step.

    Columns 0 and 1 of the table mean "active" and "no clamps", as in a `ClampTable`
    with `max_clamps` clamps, and it is at least as wide. So the stages that find and
    encode the active tokens take either.

    Args:
        max_read: the most values that a request reads of a token here.

    Buffers:
        packed: int32 `[R, max(2 + 3K, 4 + max_read)]`: active, 0, top_k, count, then
            `count` feature indices, ascending. Row 0 is all zeros: not read.
        out: int32 `[max_tokens, width]`, rows as `vllm.config.sae_features` has them;
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
        max_read: int = DEFAULT_MAX_READ_VALUES,
    ):
        super().__init__()
        self.max_clamps = max_clamps
        self.max_read = max_read
        i32 = torch.int32
        columns = max(2 + 3 * max_clamps, TABLE_HEAD + max_read)
        table = torch.zeros(num_rows, columns, dtype=i32, device=device)
        self.register_buffer("packed", table, persistent=False)
        out = torch.full((max_tokens, self.width), NOT_READ, dtype=i32, device=device)
        self.register_buffer("out", out, persistent=False)
        scale = torch.ones(d_sae, device=device)
        self.register_buffer("scale", scale, persistent=False)

    @property
    def width(self) -> int:
        """Words of a row: num_active, num_listed, `max_read` values and features."""
        return 2 + 2 * self.max_read

    def set_scale(self, decoder_norms: np.ndarray | None) -> None:
        """Return activations in units of unit-norm decoder rows; native ones if None.

        Args:
            decoder_norms: float32 `[<= F]`, what the units are: `f * norm`.
        """
        self.scale.fill_(1.0)
        if decoder_norms is not None:
            self.scale[: len(decoder_norms)].copy_(torch.from_numpy(decoder_norms))
