# SPDX-License-Identifier: Apache-2.0
"""Llama Scope: `hyperparams.json` and `checkpoints/final.safetensors`.

Trained on activations scaled to norm sqrt(D): `s = sqrt(D) / average norm`. Folding
both scales out leaves `W_enc` as it is, divides `b_enc` by the input scale and
`b_dec` by the output scale, and multiplies `W_dec` by their ratio. The one threshold
applies after that, to the pre-activation times the norm of the decoder row.
`encoder.weight` is `[F, D]`, `decoder.weight` `[D, F]`. The decoder norms count as in
llamascopium, the authors' own library; SAELens leaves them out.
Source: arXiv:2410.20526, https://github.com/OpenMOSS/Language-Model-SAEs
"""

from __future__ import annotations

import math

from vllm.config.steering import Activation
from vllm.config.steering_json import Json
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
)
from vllm.model_executor.model_loader.sae_formats.tensor_files import open_tensors

CONFIG = "hyperparams.json"
WEIGHTS = "checkpoints/final.safetensors"
_SUBTRACTS = "apply_decoder_bias_to_pre_encoder"
W_ENC = Matrix("encoder.weight")
W_DEC = Matrix("decoder.weight", features_last=True)


def matches(location: Location) -> bool:
    return location.has(CONFIG, WEIGHTS)


def read(location: Location) -> ModuleLayout:
    """Layout of a Llama Scope directory."""
    config = Fields(read_json(location.root / CONFIG), CONFIG)
    points = points_of(config, location)
    with open_tensors(location.root / WEIGHTS) as tensors:
        F, D = matrix_shape(tensors, W_ENC)
        for name in tensors.infos:
            if name.startswith("encoder_glu"):
                raise LayoutError(f"{WEIGHTS}: {name}: a GLU encoder cannot be folded")
    for key, size in (("d_sae", F), ("d_model", D)):
        if config.integer(key, 1, size) != size:
            raise config.fail(key, f"{size}, which {WEIGHTS} has for encoder.weight")
    activation, k, extra = _activation(config)
    has_b_dec = config.boolean("use_decoder_bias", True)
    scales = _scales(config, D)
    subtracts = has_b_dec and config.boolean(_SUBTRACTS, False)
    if subtracts and scales.get("W_dec_scale", 1) != 1:
        raise config.fail(_SUBTRACTS, "false, since input and output differ in scale")
    layout = SAELayout(
        site=points.site(D, F, activation, k),
        file=WEIGHTS,
        W_enc=W_ENC,
        W_dec=W_DEC,
        b_enc="encoder.bias",
        b_dec="decoder.bias" if has_b_dec else None,
        subtract_b_dec=subtracts,
        unit_decoder_rows=config.boolean("sparsity_include_decoder_norm", True),
        **scales,
        **extra,
    )
    return ModuleLayout(kind="sae", sites=(layout,))


def points_of(config: Fields, location: Location) -> Points:
    """The points that a configuration of this library, of any version, states."""
    if config.boolean("use_glu_encoder", False):
        raise config.fail("use_glu_encoder", "false (a GLU encoder cannot be folded)")
    stated, hook_in = None, config.text("hook_point_in")
    where = f"{config.where}: hook_point_in"
    if hook_in is not None:
        stated = need_points(hook_in, config.text("hook_point_out"), where)
    return choose_points(location, stated, where)


def _activation(config: Fields) -> tuple[Activation, int | None, Json]:
    function = config.text("act_fn") or "jumprelu"
    if function == "relu":
        return Activation.RELU, None, {}
    if function == "topk":
        return Activation.TOPK, config.need_integer("top_k", 1), {}
    if function != "jumprelu":
        raise config.fail("act_fn", "relu, jumprelu or topk")
    threshold = config.number("jump_relu_threshold", positive=False)
    if threshold is None:
        raise config.fail("jump_relu_threshold", "a finite number")
    return Activation.JUMPRELU, None, {"threshold": threshold}


def _scales(config: Fields, d_model: int) -> Json:
    kind = config.text("norm_activation") or "dataset-wise"
    if kind in ("none", "inference"):
        return {}
    if kind != "dataset-wise":
        raise config.fail(
            "norm_activation",
            "dataset-wise, inference or none (per-token norms cannot be folded)",
        )
    norms = config.sub("dataset_average_activation_norm")
    found = {key: norms.number(key) for key in ("in", "out")}
    if found["in"] is None:
        raise norms.fail("in", "a finite positive number")
    s_in = math.sqrt(d_model) / found["in"]
    s_out = math.sqrt(d_model) / (found["out"] or found["in"])
    return {
        "b_enc_scale": 1 / s_in,
        "W_dec_scale": s_in / s_out,
        "b_dec_scale": 1 / s_out,
    }
