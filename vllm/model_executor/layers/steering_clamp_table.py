# SPDX-License-Identifier: Apache-2.0
"""The clamp rows of a slot, as its kernels address them."""

from __future__ import annotations

import torch
from torch import nn


class ClampTable(nn.Module):
    """Clamp rows of one module at one site for one tier.

    One int32 buffer `packed [R, 2 + 3K]` holds them, so that a changed row is one
    copy; the attributes are views into it. Row 0 is all zeros: not steered.

    Attributes:
        active: int32 `[R]`, 1 where the row edits at this site.
        count: int32 `[R]`, clamps in the row, 0..K.
        feature: int32 `[R, K]`, direction index of each clamp.
        code: int32 `[R, K]`, `ClampKind`, `ONLY_IF_ACTIVE`, `ClampFlag`, and the place
            of a condition (`CONDITION_SHIFT`).
        value: float32 `[R, K]`, in the module's native units.
        in_use: whether some request of the step holds a row that edits; on the host.
    """

    packed: torch.Tensor

    def __init__(self, num_rows: int, max_clamps: int, device: torch.device):
        super().__init__()
        self.num_rows, self.max_clamps = num_rows, max_clamps
        self.in_use = True
        shape = (num_rows, 2 + 3 * max_clamps)
        packed = torch.zeros(shape, dtype=torch.int32, device=device)
        self.register_buffer("packed", packed, persistent=False)

    @property
    def active(self) -> torch.Tensor:
        return self.packed[:, 0]

    @property
    def count(self) -> torch.Tensor:
        return self.packed[:, 1]

    @property
    def feature(self) -> torch.Tensor:
        return self.packed[:, 2 : 2 + self.max_clamps]

    @property
    def code(self) -> torch.Tensor:
        return self.packed[:, 2 + self.max_clamps : 2 + 2 * self.max_clamps]

    @property
    def value(self) -> torch.Tensor:
        return self.packed[:, 2 + 2 * self.max_clamps :].view(torch.float32)
