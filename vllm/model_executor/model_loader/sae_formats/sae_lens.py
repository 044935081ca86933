# SPDX-License-Identifier: Apache-2.0
"""SAELens directories: `cfg.json` and `sae_weights.safetensors`.

Both the layout of SAELens 6 (site under `metadata`) and the flat one before it.
`W_enc` is `[D, F]`, `W_dec` `[F, D]`. BatchTopK and Matryoshka SAEs are saved as
JumpReLU; their training checkpoints, with one scalar threshold, load too.
Source: https://github.com/decoderesearch/SAELens (sae_lens/saes).
"""

from __future__ import annotations

from typing import Any

import torch

from vllm.config.steering import Activation, HookPoint, SiteInfo
from vllm.model_executor.model_loader.sae_formats.fold import (
    matrix_shape,
    read_vector,
)
from vllm.model_executor.model_loader.sae_formats.layout import (
    Fields,
    Gate,
    LayoutError,
    Location,
    Matrix,
    ModuleLayout,
    SAELayout,
    need_site,
    read_json,
)
from vllm.model_executor.model_loader.sae_formats.tensor_files import (
    TensorFile,
    open_tensors,
)

CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"
SCALER = "activation_scaler.json"
W_ENC = Matrix("W_enc", features_last=True)
W_DEC = Matrix("W_dec")
ARCHITECTURES = (
    "standard",
    "jumprelu",
    "topk",
    "batchtopk",
    "matryoshka_batchtopk",
    "gated",
)


def matches(location: Location) -> bool:
    return location.has(CONFIG, WEIGHTS)


def read(location: Location) -> ModuleLayout:
    """Layout of a SAELens directory."""
    cfg = Fields(read_json(location.root / CONFIG), CONFIG)
    metadata = cfg.sub("metadata") if "metadata" in cfg.data else cfg
    _refuse_what_cannot_fold(cfg, metadata)
    architecture, k = _architecture(cfg)
    with open_tensors(location.root / WEIGHTS) as tensors:
        F, D = matrix_shape(tensors, W_DEC)
        for key, size in (("d_sae", F), ("d_in", D)):
            if cfg.integer(key, 1, size) != size:
                raise cfg.fail(key, f"{size}, which {WEIGHTS} has for W_dec")
        _refuse_finetuning(tensors)
        layer, hook = location.site(_site(metadata), f"{CONFIG}: hook_name")
        scale = _input_scale(cfg, metadata, location)
        site = SiteInfo(
            layer=layer,
            hook=hook,
            d_in=D,
            d_sae=F,
            activation=_ACTIVATION[architecture],
            k=k,
        )
        if k is not None and k > F:
            raise LayoutError(f"{CONFIG}: k: expected at most {F}, found {k}")
        layout = SAELayout(
            site=site,
            file=WEIGHTS,
            W_enc=W_ENC,
            W_dec=W_DEC,
            subtract_b_dec=cfg.boolean("apply_b_dec_to_input", True),
            W_enc_scale=scale,
            W_dec_scale=1 / scale,
            b_dec_scale=1 / scale,
            **_encoder(architecture, cfg, tensors, scale),
        )
    return ModuleLayout(kind="sae", sites=(layout,), model=metadata.text("model_name"))


_ACTIVATION = {
    "standard": Activation.RELU,
    "topk": Activation.TOPK,
    **dict.fromkeys(
        ("jumprelu", "batchtopk", "matryoshka_batchtopk", "gated"), Activation.JUMPRELU
    ),
}


def _architecture(cfg: Fields) -> tuple[str, int | None]:
    """Architecture and `k`; before SAELens 6, TopK was an activation function."""
    architecture = cfg.text("architecture") or "standard"
    function = cfg.text("activation_fn") or cfg.text("activation_fn_str") or "relu"
    if function == "topk" and architecture in ("standard", "topk"):
        kwargs = cfg.sub("activation_fn_kwargs")
        return "topk", cfg.integer("k", 1) or kwargs.need_integer("k", 1)
    if function not in ("relu", "topk"):
        raise cfg.fail(
            "activation_fn" if "activation_fn" in cfg.data else "activation_fn_str",
            "relu or topk",
        )
    if architecture not in ARCHITECTURES:
        raise cfg.fail(
            "architecture",
            f"one that folds into an encoder and a decoder matrix "
            f"({', '.join(ARCHITECTURES)})",
        )
    return architecture, cfg.need_integer("k", 1) if architecture == "topk" else None


def _refuse_what_cannot_fold(cfg: Fields, metadata: Fields) -> None:
    normalize = cfg.data.get("normalize_activations")
    foldable = (None, False, True, "none", "expected_average_only_in")
    if not any(normalize is ok or normalize == ok for ok in foldable):
        raise cfg.fail(
            "normalize_activations",
            "none or expected_average_only_in (per-token normalisation and whitening "
            "are not folded)",
        )
    if cfg.text("reshape_activations") not in (None, "none"):
        raise cfg.fail("reshape_activations", "none (residual-stream SAEs only)")
    if metadata.data.get("hook_head_index") is not None:
        raise metadata.fail("hook_head_index", "null (residual-stream SAEs only)")
    for key in ("hook_name_out", "hook_layer_out", "d_out"):
        fields = metadata if metadata.data.get(key) is not None else cfg
        if fields.data.get(key) is not None:
            raise fields.fail(key, "nothing (a transcoder is not an SAE)")


def _refuse_finetuning(tensors: TensorFile) -> None:
    for name in ("scaling_factor", "finetuning_scaling_factor"):
        if name in tensors.infos and not torch.equal(
            (value := read_vector(tensors, name)), torch.ones_like(value)
        ):
            raise LayoutError(f"{tensors.label}: {name}: expected all ones, found else")


def _site(metadata: Fields) -> tuple[int, HookPoint] | None:
    key = "hook_name" if metadata.data.get("hook_name") is not None else "hook_point"
    name = metadata.text(key)
    if name is None:
        return None
    # Old configurations hold a template and the layer beside it.
    layer = metadata.integer("hook_layer")
    if layer is None:
        layer = metadata.integer("hook_point_layer")
    if layer is not None:
        name = name.replace("{layer}", str(layer))
    return need_site(name, f"{metadata.where}: {key}")


def _input_scale(cfg: Fields, metadata: Fields, location: Location) -> float:
    """The factor that the SAE's input was multiplied by in training, 1 if folded."""
    if cfg.data.get("normalize_activations") not in (True, "expected_average_only_in"):
        return 1.0
    for fields in (cfg, metadata):
        if (scale := fields.number("norm_scaling_factor")) is not None:
            return scale
    if location.has(SCALER):
        fields = Fields(read_json(location.root / SCALER), SCALER)
        if (scale := fields.number("scaling_factor")) is not None:
            return scale
    raise LayoutError(
        f"{CONFIG}: norm_scaling_factor: normalize_activations is "
        f"expected_average_only_in, expected the factor here or in {SCALER} "
        "(scaling_factor), found neither"
    )


def _encoder(
    architecture: str, cfg: Fields, tensors: TensorFile, scale: float
) -> dict[str, Any]:
    """The fields of the layout that differ between architectures."""
    rescale = cfg.boolean("rescale_acts_by_decoder_norm", False)
    if architecture == "gated":
        return {"b_enc": None, "gate": Gate("r_mag", "b_mag", "b_gate")}
    if architecture == "jumprelu":
        return {"threshold": "threshold"}
    if architecture == "topk":
        return {"unit_decoder_rows": rescale}
    if architecture == "standard":
        return {}
    if "threshold" in tensors.infos:
        return {"threshold": "threshold"}
    # The training threshold is in units of the pre-activation times the norm of the
    # decoder row, and the row is divided by the input scale.
    return {
        "threshold": "topk_threshold",
        "unit_decoder_rows": rescale,
        "threshold_scale": 1 / scale if rescale else 1.0,
    }
