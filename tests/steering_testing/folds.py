# SPDX-License-Identifier: Apache-2.0
"""Every way in which loading folds an SAE, and tensors to fold."""

from __future__ import annotations

from dataclasses import replace

import torch

from vllm.config.steering import Activation, SiteInfo
from vllm.config.steering_points import HookPoint
from vllm.model_executor.model_loader.sae_formats.layout import (
    Gate,
    Matrix,
    SAELayout,
)

F, D = 70, 37
PLAIN = SAELayout(
    site=SiteInfo(3, HookPoint.POST_BLOCK, D, F, Activation.JUMPRELU),
    file="t.safetensors",
    W_enc=Matrix("W_enc"),
    W_dec=Matrix("W_dec"),
    threshold="threshold",
)
TRANSCODER = SiteInfo(
    layer=3,
    hook=HookPoint.MLP_IN,
    d_in=D,
    d_sae=F,
    activation=Activation.RELU,
    hook_out=HookPoint.MLP_OUT,
    d_out=29,
    has_skip=True,
)
LAYOUTS = {
    "plain": PLAIN,
    "input bias": replace(PLAIN, subtract_b_dec=True),
    "unit rows": replace(PLAIN, unit_decoder_rows=True, subtract_b_dec=True),
    "scales": replace(
        PLAIN,
        subtract_b_dec=True,
        W_enc_scale=0.37,
        b_enc_scale=1.3,
        W_dec_scale=2.7,
        b_dec_scale=0.11,
        threshold_scale=5.1,
    ),
    "centred": replace(PLAIN, centre_input=True, subtract_b_dec=True),
    "centred, no bias": replace(PLAIN, centre_input=True),
    "log threshold": replace(PLAIN, threshold_is_log=True),
    "one threshold": replace(PLAIN, threshold=0.25),
    "gated": replace(PLAIN, gate=Gate("r_mag", "b_mag", "b_gate"), subtract_b_dec=True),
    "transposed": replace(
        PLAIN,
        W_enc=Matrix("W_enc_T", features_last=True),
        W_dec=Matrix("W_dec_T", features_last=True),
        unit_decoder_rows=True,
        subtract_b_dec=True,
    ),
    "no biases": replace(PLAIN, b_enc=None, b_dec=None),
    "transcoder": replace(
        PLAIN,
        site=TRANSCODER,
        W_dec=Matrix("W_out"),
        W_skip=Matrix("W_skip_T", features_last=True),
        b_dec="b_out",
        threshold=None,
    ),
}


def stored(dtype: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors of every name that the layouts use."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    W_enc, W_dec = normal(F, D), normal(F, D)
    W_dec[5] = 0  # a dead feature
    tensors = {
        "W_enc": W_enc,
        "W_dec": W_dec,
        "W_enc_T": W_enc.T.contiguous(),
        "W_dec_T": W_dec.T.contiguous(),
        "W_out": normal(F, 29),
        "W_skip_T": normal(D, 29),
        "b_out": normal(29),
        "b_dec": normal(D),
    }
    for name in ("b_enc", "threshold", "r_mag", "b_mag", "b_gate"):
        tensors[name] = normal(F)
    return {name: value.to(dtype) for name, value in tensors.items()}
