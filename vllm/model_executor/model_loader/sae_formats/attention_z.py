# SPDX-License-Identifier: Apache-2.0
"""Attention SAEs of Kissane et al.: `NAME.pt` and `NAME_cfg.json`.

ReLU SAEs on `hook_z`, all heads side by side; `W_enc [D, F]`, `W_dec [F, D]`, and the
encoder reads `x - b_dec`. The configuration has `act_name`, `act_size`, `dict_size`.
They were trained on models as TransformerLens loads them by default, which moves the
bias of the values behind the output projection; so their `hook_z` lacks it.
Source: arXiv:2406.17759, https://huggingface.co/ckkissane
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from vllm.config.steering import Activation
from vllm.config.steering_points import HookPoint
from vllm.model_executor.model_loader.sae_formats.fold import matrix_shape
from vllm.model_executor.model_loader.sae_formats.layout import (
    Fields,
    Location,
    Matrix,
    ModuleLayout,
    SAELayout,
    read_json,
)
from vllm.model_executor.model_loader.sae_formats.names import (
    choose_points,
    need_points,
)
from vllm.model_executor.model_loader.sae_formats.tensor_files import open_tensors


def _config(path: Path) -> Path:
    return path.with_name(f"{path.stem}_cfg.json")


def matches(location: Location) -> bool:
    path = location.root
    return path.is_file() and path.suffix == ".pt" and _config(path).is_file()


def read(location: Location) -> ModuleLayout:
    """Layout of one attention SAE."""
    path = location.root
    cfg = Fields(read_json(_config(path)), _config(path).name)
    name = cfg.text("act_name")
    stated = need_points(name, None, f"{cfg.where}: act_name") if name else None
    points = choose_points(location, stated, f"{cfg.where}: act_name")
    points = replace(points, before_value_bias=points.hook is HookPoint.ATTN_Z)
    W_enc, W_dec = Matrix("W_enc", features_last=True), Matrix("W_dec")
    with open_tensors(path) as tensors:
        F, D = matrix_shape(tensors, W_dec)
    for key, size in (("dict_size", F), ("act_size", D)):
        if cfg.integer(key, 1, size) != size:
            raise cfg.fail(key, f"{size}, which {path.name} has for W_dec")
    layout = SAELayout(
        site=points.site(D, F, Activation.RELU),
        file=path.name,
        W_enc=W_enc,
        W_dec=W_dec,
        subtract_b_dec=True,
    )
    return ModuleLayout(kind="sae", sites=(layout,))
