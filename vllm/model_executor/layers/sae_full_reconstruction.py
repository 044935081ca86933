# SPDX-License-Identifier: Apache-2.0
"""SAE full reconstruction: the SAE's reconstruction replaces the stream.

`x' = b_dec + sum_i f_i W_dec[i] + sum_c (g_c - f_c) W_dec[c]`: Golden Gate Claude
(Templeton et al. 2024) with the error term dropped. A transcoder reads `x` at one
point. Its output, plus `W_skip x` if it has a skip connection, replaces what the MLP
writes at another point (Dunefsky et al. 2024, Paulo et al. 2025). `steering_reference`
is the definition; a GPU backend computes the same.
"""

from __future__ import annotations

import torch

from vllm.model_executor.layers.steering import edits_in_place, get_site
from vllm.model_executor.layers.steering_stream import Stream
from vllm.utils.torch_utils import direct_register_custom_op


def apply_sae_full_reconstruction(
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    site_name: str,
    source: torch.Tensor | None = None,
) -> None:
    """Reading and the full tier at a site: `SteeringBackend.full_tier`."""
    site = get_site(site_name)
    site.backend.full_tier(list(site.saes), Stream(hidden, residual, source))


direct_register_custom_op(
    op_name="apply_sae_full_reconstruction",
    op_func=apply_sae_full_reconstruction,
    mutates_args=["hidden", "residual"],
    fake_impl=edits_in_place,
)
