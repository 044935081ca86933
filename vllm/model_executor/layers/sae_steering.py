# SPDX-License-Identifier: Apache-2.0
"""The SAE delta tier: clamp features and keep what the SAE does not explain.

`x' = x + sum_c (g_c - f_c) W_dec[c]` is Templeton et al. 2024, "Scaling
Monosemanticity", with the SAE's error term added back. For a transcoder, `x` is the
MLP's true output and `f` comes from the MLP's input.
"""

from __future__ import annotations

import torch

from vllm.model_executor.layers.steering import edits_in_place, get_site
from vllm.model_executor.layers.steering_stream import Stream
from vllm.utils.torch_utils import direct_register_custom_op


def apply_sae_clamp(
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    site_name: str,
    source: torch.Tensor | None = None,
) -> None:
    """The delta tier at a site, one module after another in registration order."""
    site, stream = get_site(site_name), Stream(hidden, residual, source)
    for slot in site.saes:
        site.backend.sae_clamp(slot, stream)


direct_register_custom_op(
    op_name="apply_sae_clamp",
    op_func=apply_sae_clamp,
    mutates_args=["hidden", "residual"],
    fake_impl=edits_in_place,
)
