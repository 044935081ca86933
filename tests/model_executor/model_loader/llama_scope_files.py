# SPDX-License-Identifier: Apache-2.0
"""Files in the layout of Llama Scope."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sae_reference import write_json
from safetensors.torch import save_file

HOOK = "blocks.12.hook_resid_post"


def save_llama_scope(
    path: Path,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor,
    W_dec: torch.Tensor,
    b_dec: torch.Tensor,
    **config: Any,
) -> None:
    """Write an SAE of `W_enc [F, D]` and `W_dec [F, D_out]`.

    Args:
        config: replaces entries of the released SAEs' configuration.
    """
    d_sae, d_model = W_enc.shape
    base = {
        "d_model": d_model,
        "d_sae": d_sae,
        "hook_point_in": HOOK,
        "hook_point_out": HOOK,
        "act_fn": "jumprelu",
        "jump_relu_threshold": 0.6,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": 3.0, "out": 2.0},
        "sparsity_include_decoder_norm": True,
        "use_decoder_bias": True,
        "apply_decoder_bias_to_pre_encoder": False,
        "use_glu_encoder": False,
    }
    write_json(path / "hyperparams.json", {**base, **config})
    (path / "checkpoints").mkdir()
    tensors = {
        "encoder.weight": W_enc,
        "encoder.bias": b_enc,
        "decoder.weight": W_dec.T.contiguous(),
        "decoder.bias": b_dec,
    }
    save_file(tensors, path / "checkpoints/final.safetensors")
