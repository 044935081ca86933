# SPDX-License-Identifier: Apache-2.0
"""Gemma Scope (`params.npz`) and Gemma Scope 2 (`params.safetensors`, `config.json`).

JumpReLU SAEs with `W_enc [D, F]` and `W_dec [F, D]` that do not subtract `b_dec`. Gemma
Scope's files do not state their site. The path does, as in
`gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71`. Gemma Scope 2 has transcoders
too, with `affine_skip_connection [d_in, d_out]`. Source: arXiv:2408.05147,
https://huggingface.co/google/gemma-scope
"""

from __future__ import annotations

import math
import re

from vllm.config.steering import Activation
from vllm.config.steering_points import HookPoint
from vllm.model_executor.model_loader.sae_formats.fold import matrix_shape
from vllm.model_executor.model_loader.sae_formats.layout import (
    Fields,
    LayoutError,
    Location,
    Matrix,
    ModuleLayout,
    SAELayout,
    read_json,
)
from vllm.model_executor.model_loader.sae_formats.names import (
    Points,
    choose_points,
    need_points,
    transcoder_points,
)
from vllm.model_executor.model_loader.sae_formats.tensor_files import open_tensors

NPZ = "params.npz"
SAFETENSORS = "params.safetensors"
CONFIG = "config.json"
SKIP = "affine_skip_connection"
_LAYER = re.compile(r"layer_([0-9]{1,9})(?![0-9])")
_KIND = re.compile(
    r"(?<=-)(?:res|mlp|att|transcoders)(?![a-z])|"
    r"resid_post|mlp_out|attn_out|transcoder|crosscoder|embedding|clt"
)
# `attn_out` names the folder of Gemma Scope 2's SAEs on the output projection's input.
_HOOKS = {
    "res": HookPoint.POST_BLOCK,
    "mlp": HookPoint.MLP_OUT,
    "att": HookPoint.ATTN_Z,
    "resid_post": HookPoint.POST_BLOCK,
    "mlp_out": HookPoint.MLP_OUT,
    "attn_out": HookPoint.ATTN_Z,
}
_REFUSED = {
    "crosscoder": "a crosscoder reads several layers",
    "clt": "a cross-layer transcoder writes to several layers",
}
_WHERE = "layer_N beside the kind, such as gemma-scope-2b-pt-res or resid_post"


def matches_npz(location: Location) -> bool:
    return location.has(NPZ)


def matches_safetensors(location: Location) -> bool:
    return location.has(SAFETENSORS)


def points_of_path(location: Location) -> Points | None:
    """The points that a Gemma Scope path names, or None.

    The files of SAEs of the residual stream, of attention and of the MLP look alike,
    so a layer counts only beside the kind, as in `gemma-scope-2b-pt-res/layer_20` or
    `resid_post/layer_20_width_16k`.

    Raises:
        LayoutError: the path names a kind that is refused.
    """
    layers = _LAYER.findall(location.origin)
    kinds = _KIND.findall(location.origin)
    kind = kinds[-1] if kinds else None
    if kind in _REFUSED:
        raise LayoutError(f"{location.origin}: {kind}: {_REFUSED[kind]}")
    if kind == "embedding":
        return Points(0, HookPoint.PRE_ATTN)
    if not layers or kind is None:
        return None
    if kind in ("transcoder", "transcoders"):
        # The first Gemma Scope's transcoders were trained before the norm's gain.
        return transcoder_points(int(layers[-1]), before_gain=kind == "transcoders")
    return Points(int(layers[-1]), _HOOKS[kind])


def _layout(
    location: Location,
    file: str,
    names: tuple[str, str],
    points: Points,
    model: str | None,
) -> ModuleLayout:
    W_enc, W_dec = Matrix(names[0], features_last=True), Matrix(names[1])
    with open_tensors(location.root / file) as tensors:
        F, d_in = matrix_shape(tensors, W_enc)
        _, d_out = matrix_shape(tensors, W_dec)
        has_skip = SKIP in tensors.infos
    if has_skip and points.hook_out is None:
        raise LayoutError(f"{file}: {SKIP}: a transcoder's, but the site is an SAE's")
    site = points.site(d_in, F, Activation.JUMPRELU, None, d_out, has_skip)
    # Trained on embeddings before Gemma multiplies them by sqrt(D).
    is_embedding = points == Points(0, HookPoint.PRE_ATTN)
    scale = math.sqrt(d_in) if is_embedding else 1.0
    layout = SAELayout(
        site=site,
        file=file,
        W_enc=W_enc,
        W_dec=W_dec,
        threshold="threshold",
        W_enc_scale=1 / scale,
        W_dec_scale=scale,
        b_dec_scale=scale,
        W_skip=Matrix(SKIP, features_last=True) if has_skip else None,
    )
    return ModuleLayout(kind="sae", sites=(layout,), model=model)


def read_npz(location: Location) -> ModuleLayout:
    """Layout of a Gemma Scope directory."""
    where = f"{location.origin}: {_WHERE}"
    points = choose_points(location, points_of_path(location), where)
    return _layout(location, NPZ, ("W_enc", "W_dec"), points, None)


def read_safetensors(location: Location) -> ModuleLayout:
    """Layout of a Gemma Scope 2 directory; some releases have no `config.json`."""
    model = stated = affine = None
    if location.has(CONFIG):
        config = Fields(read_json(location.root / CONFIG), CONFIG)
        if config.text("architecture") not in (None, "jump_relu"):
            raise config.fail("architecture", "jump_relu")
        model = config.text("model_name")
        hook = config.text("hf_hook_point_in")
        if hook is not None:
            where = f"{CONFIG}: hf_hook_point_in"
            stated = need_points(hook, config.text("hf_hook_point_out"), where)
        affine = config.boolean("affine_connection", False)
    where = f"{location.origin}: {_WHERE}"
    points = choose_points(location, stated or points_of_path(location), where)
    layout = _layout(location, SAFETENSORS, ("w_enc", "w_dec"), points, model)
    has_skip = layout.sites[0].site.has_skip
    if affine not in (None, has_skip):
        raise LayoutError(
            f"{CONFIG}: affine_connection: expected {has_skip}, since {SAFETENSORS} "
            f"{'has' if has_skip else 'has no'} {SKIP}; found {affine}"
        )
    return layout
