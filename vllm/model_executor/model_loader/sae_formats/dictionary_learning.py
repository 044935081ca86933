# SPDX-License-Identifier: Apache-2.0
"""dictionary_learning: `config.json` and `ae.pt`, one entry per dictionary class.

Linear layers store the encoder as `[F, D]` and the decoder as `[D, F]`; the classes
with plain parameters store them as `[D, F]` and `[F, D]`. All but JumpReLU and
AutoEncoderNew encode `x - b_dec`. The library records the output of a module of the
Hugging Face model, so `attn_out` and `mlp_out` are the modules' own outputs, before a
norm that a layer may have behind them.
Source: https://github.com/saprmarks/dictionary_learning
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from vllm.config.steering import Activation, SiteInfo
from vllm.config.steering_points import HOOK_ALIASES, HookPoint
from vllm.model_executor.model_loader.sae_formats.fold import matrix_shape
from vllm.model_executor.model_loader.sae_formats.layout import (
    Fields,
    Gate,
    Location,
    Matrix,
    ModuleLayout,
    SAELayout,
    read_json,
)
from vllm.model_executor.model_loader.sae_formats.stated import need_k, refuse_unused
from vllm.model_executor.model_loader.sae_formats.tensor_files import open_tensors

CONFIG = "config.json"
WEIGHTS = "ae.pt"


@dataclass(frozen=True)
class _DictClass:
    activation: Activation
    W_enc: Matrix
    W_dec: Matrix
    b_enc: str | None
    b_dec: str
    threshold: str | None = None
    gate: Gate | None = None
    subtract_b_dec: bool = True


_MODULE_OUTPUTS = (HookPoint.ATTN_OUT, HookPoint.MLP_OUT)
_LINEAR = (Matrix("encoder.weight"), Matrix("decoder.weight", features_last=True))
_PLAIN = (Matrix("W_enc", features_last=True), Matrix("W_dec"))
CLASSES = {
    "AutoEncoder": _DictClass(Activation.RELU, *_LINEAR, "encoder.bias", "bias"),
    "AutoEncoderNew": _DictClass(
        Activation.RELU, *_LINEAR, "encoder.bias", "decoder.bias", subtract_b_dec=False
    ),
    "AutoEncoderTopK": _DictClass(Activation.TOPK, *_LINEAR, "encoder.bias", "b_dec"),
    "BatchTopKSAE": _DictClass(
        Activation.JUMPRELU, *_LINEAR, "encoder.bias", "b_dec", "threshold"
    ),
    "MatryoshkaBatchTopKSAE": _DictClass(
        Activation.JUMPRELU, *_PLAIN, "b_enc", "b_dec", "threshold"
    ),
    "GatedAutoEncoder": _DictClass(
        Activation.JUMPRELU,
        *_LINEAR,
        None,
        "decoder_bias",
        gate=Gate("r_mag", "mag_bias", "gate_bias"),
    ),
    "JumpReluAutoEncoder": _DictClass(
        Activation.JUMPRELU,
        *_PLAIN,
        "b_enc",
        "b_dec",
        "threshold",
        subtract_b_dec=False,
    ),
}


def matches(location: Location) -> bool:
    return location.has(CONFIG, WEIGHTS)


def read(location: Location) -> ModuleLayout:
    """Layout of a dictionary_learning directory."""
    config = Fields(read_json(location.root / CONFIG), CONFIG)
    trainer = config.sub("trainer")
    name = trainer.text("dict_class")
    if name not in CLASSES:
        raise trainer.fail("dict_class", f"one of {', '.join(CLASSES)}")
    kind = CLASSES[name]
    stated = _site(config, trainer)
    layer, hook = location.site(stated, f"{CONFIG}: trainer: layer and buffer: io")
    with open_tensors(location.root / WEIGHTS) as tensors:
        F, D = matrix_shape(tensors, kind.W_dec)
        is_topk = kind.activation is Activation.TOPK
        k = need_k(trainer, F, tensors) if is_topk else None
        for key, size in (("dict_size", F), ("activation_dim", D)):
            if trainer.integer(key, 1, size) != size:
                raise trainer.fail(key, f"{size}, which {WEIGHTS} has for its decoder")
        layout = SAELayout(
            site=SiteInfo(
                layer,
                hook,
                D,
                F,
                kind.activation,
                k,
                raw_output=stated is not None and hook in _MODULE_OUTPUTS,
            ),
            file=WEIGHTS,
            W_enc=kind.W_enc,
            W_dec=kind.W_dec,
            b_enc=kind.b_enc,
            b_dec=kind.b_dec,
            threshold=kind.threshold,
            gate=kind.gate,
            subtract_b_dec=kind.subtract_b_dec,
        )
        if not is_topk:  # which ignores its threshold
            refuse_unused(layout, tensors, f"{CONFIG} says {name}")
    model = trainer.text("lm_name")
    return ModuleLayout(kind="sae", sites=(layout,), model=model)


def _site(config: Fields, trainer: Fields) -> tuple[int, HookPoint] | None:
    """Layer and hook. Without a submodule name, the SAE is on the layer's output."""
    buffer = config.sub("buffer")
    io = buffer.text("io")
    if io == "in_and_out":
        raise buffer.fail("io", "out or in (it reads one point and writes another)")
    layer = trainer.integer("layer")
    if layer is None or io not in (None, "out"):
        # On the submodule's input, only the operator can name the point.
        return None
    submodule = trainer.text("submodule_name")
    if submodule is None:
        return layer, HookPoint.POST_BLOCK
    match = re.match(
        rf"(resid_(?:pre|mid|post)|(?:attn|mlp)_out)_layer_{layer}(?![0-9])", submodule
    )
    if match is None:
        raise trainer.fail(
            "submodule_name",
            f"resid_post_layer_{layer}, attn_out_layer_{layer} or "
            f"mlp_out_layer_{layer}, by the field layer",
        )
    return layer, HOOK_ALIASES[match[1]]
