# SPDX-License-Identifier: Apache-2.0
"""The token ids that modules bypass, as bits that the device looks up."""

from __future__ import annotations

import numpy as np


class SkipSets:
    """Distinct skip sets of the modules, one flag bit each.

    `bits[id]` is the int32 flag word of token `id`.
    """

    def __init__(self, vocab_size: int):
        self.bits: np.ndarray = np.zeros(vocab_size, dtype=np.int32)
        self._masks: dict[tuple[int, ...], int] = {}

    def mask(self, ids: tuple[int, ...]) -> int:
        """The flag mask of a skip set, which takes a free bit if it is new.

        The configuration was checked to have at most `MAX_SKIP_SETS` sets.
        """
        if not ids:
            return 0
        if ids not in self._masks:
            used = sum(self._masks.values())
            mask = ~used & (used + 1)
            self._masks[ids] = mask
            known = [i for i in ids if 0 <= i < len(self.bits)]
            self.bits &= ~mask
            self.bits[known] |= mask
        return self._masks[ids]

    def keep_only(self, used: set[tuple[int, ...]]) -> None:
        """Free the bits of the skip sets that no module has any more."""
        self._masks = {ids: mask for ids, mask in self._masks.items() if ids in used}
