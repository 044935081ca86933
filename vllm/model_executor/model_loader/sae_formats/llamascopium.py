# SPDX-License-Identifier: Apache-2.0
"""llamascopium 2 (formerly lm-saes): `config.json` and `sae_weights.safetensors`.

The package saves `W_E [D, F]`, `b_E`, `W_D [F, D]`, `b_D`. Llama Scope R1 Distill has
linear layers instead: `encoder.weight [F, D]`, `decoder.weight [D, F]` and biases. The
threshold of each feature is the exponential of `log_jumprelu_threshold`
(`activation_function.` may stand before it). With `sparsity_include_decoder_norm` it
applies to the pre-activation times the norm of the decoder row. In `dataset-wise` mode
the SAE reads `s_in x` and gives `s_out y`, with `s = sqrt(D) / average norm`; the norms
are in the weights, or the release list states the factor.
Source: https://github.com/OpenMOSS/Language-Model-SAEs
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vllm.config.steering import Activation
from vllm.config.steering_json import Json
from vllm.model_executor.model_loader.sae_formats.fold import (
    matrix_shape,
    read_floats,
)
from vllm.model_executor.model_loader.sae_formats.layout import (
    Fields,
    LayoutError,
    Location,
    Matrix,
    ModuleLayout,
    SAELayout,
    read_json,
)
from vllm.model_executor.model_loader.sae_formats.llama_scope import points_of
from vllm.model_executor.model_loader.sae_formats.names import Points
from vllm.model_executor.model_loader.sae_formats.stated import need_k
from vllm.model_executor.model_loader.sae_formats.tensor_files import open_tensors
from vllm.model_executor.model_loader.sae_formats.tensor_types import TensorFile

CONFIG = "config.json"
WEIGHTS = "sae_weights.safetensors"
_NORM = "dataset_average_activation_norm."
_THRESHOLDS = ("log_jumprelu_threshold", "activation_function.log_jumprelu_threshold")
_SAE_TYPES = (None, "sae")


@dataclass(frozen=True)
class _Names:
    """The names of an SAE's tensors."""

    W_enc: Matrix
    b_enc: str
    W_dec: Matrix
    b_dec: str


_LINEAR = _Names(
    Matrix("encoder.weight"),
    "encoder.bias",
    Matrix("decoder.weight", features_last=True),
    "decoder.bias",
)
_PLAIN = _Names(Matrix("W_E", features_last=True), "b_E", Matrix("W_D"), "b_D")


def _names(tensors: TensorFile) -> _Names:
    return _PLAIN if _PLAIN.W_enc.name in tensors.infos else _LINEAR


def matches(location: Location) -> bool:
    return location.has(CONFIG, WEIGHTS) and not location.has("cfg.json")


def read(location: Location) -> ModuleLayout:
    """Layout of a llamascopium directory."""
    config = Fields(read_json(location.root / CONFIG), CONFIG)
    if config.text("sae_type") not in _SAE_TYPES:
        raise config.fail("sae_type", "sae (one layer's SAE or transcoder)")
    if config.boolean("apply_decoder_bias_to_pre_encoder", False):
        raise config.fail("apply_decoder_bias_to_pre_encoder", "false")
    points = points_of(config, location)
    with open_tensors(location.root / WEIGHTS) as tensors:
        W_enc = _names(tensors).W_enc
        _, D = matrix_shape(tensors, W_enc)
        if config.integer("d_model", 1, D) != D:
            raise config.fail("d_model", f"{D}, which {WEIGHTS} has for {W_enc.name}")
        layout = _layout(config, tensors, points, location.overrides.scale)
    return ModuleLayout(kind="sae", sites=(layout,), model=None)


def _layout(
    config: Fields, tensors: TensorFile, points: Points, listed: float | None
) -> SAELayout:
    names = _names(tensors)
    F, D = matrix_shape(tensors, names.W_enc)
    s_in, s_out = _scales(config, tensors, D, listed)
    by_norm = config.boolean("sparsity_include_decoder_norm", True)
    activation, k, extra = _activation(config, tensors, F)
    return SAELayout(
        site=points.site(D, F, activation, k),
        file=WEIGHTS,
        W_enc=names.W_enc,
        W_dec=names.W_dec,
        b_enc=names.b_enc,
        b_dec=names.b_dec if config.boolean("use_decoder_bias", True) else None,
        unit_decoder_rows=by_norm,
        W_enc_scale=s_in,
        W_dec_scale=1 / s_out,
        b_dec_scale=1 / s_out,
        threshold_scale=1 / s_out if by_norm else 1.0,
        **extra,
    )


def _activation(
    config: Fields, tensors: TensorFile, d_sae: int
) -> tuple[Activation, int | None, Json]:
    function = config.text("act_fn") or "relu"
    if function == "relu":
        return Activation.RELU, None, {}
    if function == "topk":
        fields = Fields({"k": config.data.get("top_k")}, f"{CONFIG}: top_k")
        return Activation.TOPK, need_k(fields, d_sae, tensors), {}
    if function != "jumprelu":
        raise config.fail("act_fn", "relu, jumprelu or topk")
    for name in _THRESHOLDS:
        if name in tensors.infos:
            return Activation.JUMPRELU, None, _log_threshold(name)
    raise LayoutError(f"{WEIGHTS}: {_THRESHOLDS[0]}: expected a tensor, found none")


def _log_threshold(name: str) -> Json:
    return {"threshold": name, "threshold_is_log": True}


def _scales(
    config: Fields, tensors: TensorFile, d_model: int, listed: float | None
) -> tuple[float, float]:
    """The factors of the SAE's input and output; 1 if they are folded already."""
    kind = config.text("norm_activation") or "dataset-wise"
    if kind == "inference":
        return 1.0, 1.0
    if kind != "dataset-wise":
        raise config.fail(
            "norm_activation",
            "dataset-wise or inference (per-token normalisation cannot be folded)",
        )
    scales = []
    for key in ("hook_point_in", "hook_point_out"):
        name = f"{_NORM}{config.text(key) or config.text('hook_point_in')}"
        if name in tensors.infos:
            norm = float(read_floats(tensors, name)[0])
            if norm <= 0:
                raise LayoutError(f"{WEIGHTS}: {name}: expected a positive norm")
            scales.append(math.sqrt(d_model) / norm)
        elif listed is not None:
            scales.append(listed)
        else:
            raise LayoutError(
                f"{WEIGHTS}: {name}: norm_activation is dataset-wise, expected the "
                "average norm here, found none; use saelens:RELEASE/SAE_ID if the SAE "
                "is in SAELens's list"
            )
    return scales[0], scales[1]
