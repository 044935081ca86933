# SPDX-License-Identifier: Apache-2.0
"""Tensors that ops take by number, because they are the same in every step."""

from __future__ import annotations

import functools
import weakref

import torch

from .extension import cuda_ops

Tensors = list[torch.Tensor]


class Held:
    """Tensors that the extension holds for many ops (`csrc/steering/held.h`).

    The first op that uses them checks them. The extension keeps them alive until this
    object goes, so ask for the number where an op is called.

    Args:
        step: as `bundles.step_bundle` gives them.
        weights: as `bundles.weights_bundle` gives them.
        workspace: those of `bundles.WORKSPACE_FIELDS`; none for the delta tier.
    """

    def __init__(
        self, step: Tensors, weights: Tensors, workspace: Tensors | None = None
    ) -> None:
        self.step, self.weights, self.workspace = step, weights, workspace or []

    @functools.cached_property
    def number(self) -> int:
        """What ops take in place of the tensors."""
        number = cuda_ops().hold(self.step, self.weights, self.workspace)
        # At the end of the process the extension may be gone before.
        weakref.finalize(self, cuda_ops().release, number).atexit = False
        return number
