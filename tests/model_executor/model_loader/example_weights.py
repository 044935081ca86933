# SPDX-License-Identifier: Apache-2.0
"""One SAE and one transcoder, for every format, and what they compute in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sae_reference import D, F, inputs, tensor

from vllm.config.steering import SiteInfo
from vllm.config.steering_points import HookPoint
from vllm.model_executor.model_loader.sae_loader import inspect_module

D_OUT = 6
W_enc = tensor(F, D, seed=10)
W_dec = tensor(F, D, seed=11) * torch.linspace(0.3, 2, F)[:, None]
W_out = tensor(F, D_OUT, seed=18)
W_skip = tensor(D_OUT, D, seed=19)
b_enc, b_dec, b_out = tensor(F, seed=12), tensor(D, seed=13), tensor(D_OUT, seed=20)
threshold = tensor(F, seed=14)
SAE = {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec}
TRANSCODER = {"W_enc": W_enc, "W_dec": W_out, "b_enc": b_enc, "b_dec": b_out}


def pre(x: torch.Tensor | None = None) -> torch.Tensor:
    x = inputs() if x is None else x
    return x @ W_enc.double().T + b_enc.double()


def jump(p: torch.Tensor) -> torch.Tensor:
    return p * (p > threshold.double().clamp(min=0))


def decode(f: torch.Tensor) -> torch.Tensor:
    return f @ W_dec.double() + b_dec.double()


def transcode(f: torch.Tensor, skip: bool) -> torch.Tensor:
    y = f @ W_out.double() + b_out.double()
    return y + inputs() @ W_skip.double().T if skip else y


def site_of(path: Path, **options: Any) -> SiteInfo:
    (site,) = inspect_module("m", str(path), **options).sites
    return site


def is_transcoder(site: SiteInfo, layer: int, skip: bool) -> bool:
    points = (site.layer, site.hook, site.out_hook)
    return (*points, site.out_width, site.has_skip) == (
        layer,
        HookPoint.MLP_IN,
        HookPoint.MLP_OUT,
        D_OUT,
        skip,
    )


def pre_activations(subtract: bool) -> torch.Tensor:
    """Of the SAE, whose decoder's bias may be taken from the input first."""
    return pre(inputs() - b_dec.double() * subtract)
