# SPDX-License-Identifier: Apache-2.0
"""SAE full reconstruction: the stream becomes what the SAE says it is.

`x' = b_dec + sum_i f_i W_dec[i] + sum_c (g_c - f_c) W_dec[c]`: Golden Gate Claude
(Templeton et al. 2024) with the error term dropped. `steering_reference` defines it;
a GPU backend computes the same.
"""

from __future__ import annotations

import torch

from vllm.model_executor.layers.steering import (
    SteeringSite,
    edits_in_place,
    get_site,
)
from vllm.utils.torch_utils import direct_register_custom_op


def apply_layer_sae_full_reconstruction(
    site: SteeringSite, hidden: torch.Tensor, residual: torch.Tensor | None
) -> None:
    """Full reconstruction alone at a site; `hidden`, `residual` `[T, D]`, in place."""
    torch.ops.vllm.apply_sae_full_reconstruction(hidden, residual, site.name)


def apply_sae_full_reconstruction(
    hidden: torch.Tensor, residual: torch.Tensor | None, site_name: str
) -> None:
    """Reading and the full tier at a site.

    Reading sees the stream that the full tier is given. A token's row of the full tier
    names one module, so the order of the slots is free.
    """
    site = get_site(site_name)
    for slot in site.saes:
        if slot.reads is not None:
            site.backend.read_features(slot, hidden, residual)
    for slot in site.saes:
        site.backend.full_reconstruction(slot, hidden, residual)


direct_register_custom_op(
    op_name="apply_sae_full_reconstruction",
    op_func=apply_sae_full_reconstruction,
    mutates_args=["hidden", "residual"],
    fake_impl=edits_in_place,
)
