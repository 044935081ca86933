# SPDX-License-Identifier: Apache-2.0
"""What is edited at a site, and what its encoders read."""

from __future__ import annotations

from typing import NamedTuple

import torch


def encoder_input(
    hidden: torch.Tensor, residual: torch.Tensor | None, source: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The stream that an encoder reads: a transcoder's source, else the one edited."""
    return (hidden, residual) if source is None else (source, None)


class Stream(NamedTuple):
    """The activations of a step's tokens at a site: `hidden + residual`.

    hidden, residual: `[T, d_out]`, the model's dtype; `residual` is None where the
        point is one tensor.
    source: `[T, d_in]`, what a transcoder's encoder reads; None for an SAE, which
        reads the point that it writes.
    """

    hidden: torch.Tensor
    residual: torch.Tensor | None = None
    source: torch.Tensor | None = None

    @property
    def read(self) -> Stream:
        """What the encoders read."""
        return Stream(*encoder_input(*self))

    def gather(self, tokens: torch.Tensor) -> torch.Tensor:
        """`[n, d_out]`: the activations of the tokens, in the model's dtype."""
        if self.residual is None:
            return self.hidden[tokens]
        return self.hidden[tokens] + self.residual[tokens]
