# SPDX-License-Identifier: Apache-2.0
"""Gemma Scope (`params.npz`) and Gemma Scope 2 (`params.safetensors`, `config.json`).

JumpReLU SAEs with `W_enc [D, F]` and `W_dec [F, D]` that do not subtract `b_dec`.
Gemma Scope's files say nothing about their site: the path does, as in
`gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71`.
Source: arXiv:2408.05147, https://huggingface.co/google/gemma-scope
"""

from __future__ import annotations

import re

from vllm.config.steering import Activation, HookPoint, SiteInfo
from vllm.model_executor.model_loader.sae_formats.fold import matrix_shape
from vllm.model_executor.model_loader.sae_formats.layout import (
    Fields,
    LayoutError,
    Location,
    Matrix,
    ModuleLayout,
    SAELayout,
    need_site,
    read_json,
)
from vllm.model_executor.model_loader.sae_formats.tensor_files import open_tensors

NPZ = "params.npz"
SAFETENSORS = "params.safetensors"
CONFIG = "config.json"
_LAYER = re.compile(r"layer_([0-9]{1,9})(?![0-9])")
_KIND = re.compile(
    r"(?<=-)(?:res|mlp|att|transcoders)(?![a-z])|"
    r"resid_post|mlp_out|attn_out|transcoder|crosscoder|embedding|clt"
)
_RESIDUAL_KINDS = ("res", "resid_post")
_WHERE = "layer_N beside the kind, such as gemma-scope-2b-pt-res or resid_post"


def matches_npz(location: Location) -> bool:
    return location.has(NPZ)


def matches_safetensors(location: Location) -> bool:
    return location.has(SAFETENSORS)


def _site_of_path(location: Location) -> tuple[int, HookPoint] | None:
    """The site that a path of Gemma Scope's names; None: the path does not say.

    The files of SAEs of the residual stream, of attention and of the MLP look alike,
    so a layer counts only beside the kind, as in `gemma-scope-2b-pt-res/layer_20` or
    `resid_post/layer_20_width_16k`.

    Raises:
        LayoutError: the path names another kind than the residual stream.
    """
    layers = _LAYER.findall(location.origin)
    kinds = _KIND.findall(location.origin)
    if not layers or not kinds:
        return None
    if (kind := kinds[-1]) not in _RESIDUAL_KINDS:
        raise LayoutError(
            f"{location.origin}: expected an SAE of the residual stream, found "
            f"{kind!r} in the path"
        )
    return int(layers[-1]), HookPoint.POST_BLOCK


def _layout(
    location: Location,
    file: str,
    names: dict[str, str],
    site: tuple[int, HookPoint],
    model: str | None,
) -> ModuleLayout:
    with open_tensors(location.root / file) as tensors:
        if "affine_skip_connection" in tensors.infos:
            raise LayoutError(
                f"{file}: affine_skip_connection: a transcoder is not an SAE"
            )
        W_dec = Matrix(names["W_dec"])
        F, D = matrix_shape(tensors, W_dec)
    layout = SAELayout(
        site=SiteInfo(site[0], site[1], D, F, Activation.JUMPRELU),
        file=file,
        W_enc=Matrix(names["W_enc"], features_last=True),
        W_dec=W_dec,
        threshold="threshold",
    )
    return ModuleLayout(kind="sae", sites=(layout,), model=model)


def read_npz(location: Location) -> ModuleLayout:
    """Layout of a Gemma Scope directory."""
    site = location.site(_site_of_path(location), f"{location.origin}: {_WHERE}")
    return _layout(location, NPZ, {"W_enc": "W_enc", "W_dec": "W_dec"}, site, None)


def read_safetensors(location: Location) -> ModuleLayout:
    """Layout of a Gemma Scope 2 directory; some releases have no `config.json`."""
    model = None
    stated = None
    if location.has(CONFIG):
        config = Fields(read_json(location.root / CONFIG), CONFIG)
        if config.text("architecture") not in (None, "jump_relu"):
            raise config.fail("architecture", "jump_relu")
        if config.boolean("affine_connection", False):
            raise config.fail("affine_connection", "false (an SAE has no skip path)")
        model = config.text("model_name")
        hook = config.text("hf_hook_point_in")
        if config.text("hf_hook_point_out") not in (None, hook):
            raise config.fail(
                "hf_hook_point_out", f"{hook!r} (a transcoder is not an SAE)"
            )
        if hook is not None:
            stated = need_site(hook, f"{CONFIG}: hf_hook_point_in")
    site = location.site(
        stated or _site_of_path(location), f"{location.origin}: {_WHERE}"
    )
    names = {"W_enc": "w_enc", "W_dec": "w_dec"}
    return _layout(location, SAFETENSORS, names, site, model)
