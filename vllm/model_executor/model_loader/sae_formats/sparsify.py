# SPDX-License-Identifier: Apache-2.0
"""EleutherAI sparsify: `cfg.json` and `sae.safetensors`, one directory per hook point.

TopK after ReLU; the encoder (`encoder.weight [F, D]`) reads `x - b_dec`, and `W_dec`
is `[F, D]`. The directory's name is the hook point: `layers.N` (or `h.N`) is the
output of block N, `layers.N.mlp` that of its MLP, before any norm after it. A
transcoder (`transcode`) reads what the MLP reads, without subtracting `b_dec`, and may
have `W_skip [d_out, d_in]`.
Source: https://github.com/EleutherAI/sparsify
"""

from __future__ import annotations

import re
from dataclasses import replace

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
    parse_site_name,
    transcoder_points,
)
from vllm.model_executor.model_loader.sae_formats.stated import need_k
from vllm.model_executor.model_loader.sae_formats.tensor_files import open_tensors

CONFIG = "cfg.json"
WEIGHTS = "sae.safetensors"
_MODULE = re.compile(
    r"(?:model\.|transformer\.|gpt_neox\.)*(?:layers|h)\.([0-9]{1,9})\."
    r"(mlp|self_attn|attn|attention)"
)


def matches(location: Location) -> bool:
    return location.has(CONFIG, WEIGHTS)


def read(location: Location) -> ModuleLayout:
    """Layout of a sparsify directory."""
    cfg = Fields(read_json(location.root / CONFIG), CONFIG)
    if cfg.boolean("signed", False):
        raise cfg.fail("signed", "false (selection by magnitude cannot be folded)")
    if cfg.text("activation") not in (None, "topk"):
        raise cfg.fail("activation", "topk")
    is_transcoder = cfg.boolean("transcode", False)
    where = f"{location.origin}: layers.N or layers.N.mlp"
    points = choose_points(location, _points(location, is_transcoder), where)
    if is_transcoder and points.hook is HookPoint.MLP_IN:
        points = replace(transcoder_points(points.layer), raw_output=True)
    elif is_transcoder:
        raise LayoutError(f"{where}: expected a transcoder of an MLP (mlp_in.N)")
    W_enc, W_dec = Matrix("encoder.weight"), Matrix("W_dec")
    with open_tensors(location.root / WEIGHTS) as tensors:
        F, d_in = matrix_shape(tensors, W_enc)
        _, d_out = matrix_shape(tensors, W_dec)
        has_skip = "W_skip" in tensors.infos
        k = need_k(cfg, F, tensors)
    if cfg.integer("d_in", 1, d_in) != d_in:
        raise cfg.fail("d_in", f"{d_in}, which {WEIGHTS} has for encoder.weight")
    if cfg.boolean("skip_connection", has_skip) != has_skip:
        raise cfg.fail("skip_connection", f"what {WEIGHTS} has: W_skip is {has_skip}")
    if has_skip and not is_transcoder:
        raise LayoutError(f"{WEIGHTS}: W_skip: an SAE has no skip path")
    layout = SAELayout(
        site=points.site(d_in, F, Activation.TOPK, k, d_out, has_skip),
        file=WEIGHTS,
        W_enc=W_enc,
        W_dec=W_dec,
        b_enc="encoder.bias",
        subtract_b_dec=not is_transcoder,
        W_skip=Matrix("W_skip") if has_skip else None,
    )
    return ModuleLayout(kind="sae", sites=(layout,))


def _points(location: Location, is_transcoder: bool) -> Points | None:
    """The points that the directory's name stands for, or None."""
    name = location.origin.rstrip("/").rsplit("/", 1)[-1]
    module = _MODULE.fullmatch(name)
    if is_transcoder:
        is_mlp = module is not None and module[2] == "mlp"
        return transcoder_points(int(module[1])) if module and is_mlp else None
    if module:
        is_mlp = module[2] == "mlp"
        hook = HookPoint.MLP_OUT if is_mlp else HookPoint.ATTN_OUT
        return Points(int(module[1]), hook, raw_output=True)
    if (site := parse_site_name(name)) is not None:
        return Points(*site)
    if name.startswith(("layers.", "h.", "embed")) and location.given is None:
        raise LayoutError(
            f"{name}: expected a hook point such as layers.5 or layers.5.mlp"
        )
    return None
