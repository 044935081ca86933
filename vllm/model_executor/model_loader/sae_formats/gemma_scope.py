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
_OTHER_KINDS = re.compile(
    r"transcoder|crosscoder|embedding|\bclt\b|mlp_out|attn_out|"
    r"scope[\w.-]*-(?:mlp|att)\b"
)


def matches_npz(location: Location) -> bool:
    return location.has(NPZ)


def matches_safetensors(location: Location) -> bool:
    return location.has(SAFETENSORS)


def _site_of_path(location: Location) -> tuple[int, HookPoint] | None:
    """The site that a path of Gemma Scope's names; other kinds are refused."""
    if location.given is not None:
        return location.given
    if match := _OTHER_KINDS.search(location.origin):
        raise LayoutError(
            f"{location.origin}: expected an SAE of the residual stream, found "
            f"{match[0]!r} in the path"
        )
    layers = re.findall(r"layer_([0-9]{1,9})(?![0-9])", location.origin)
    return (int(layers[-1]), HookPoint.POST_BLOCK) if layers else None


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
    site = location.site(_site_of_path(location), f"{location.origin}: layer_N")
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
    site = location.site(stated or _site_of_path(location), f"{location.origin}: layer")
    names = {"W_enc": "w_enc", "W_dec": "w_dec"}
    return _layout(location, SAFETENSORS, names, site, model)
