# SPDX-License-Identifier: Apache-2.0
"""Models that vLLM's Transformers backend runs are steered as Hugging Face has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from steering_testing import models
from steering_testing.backend_cases import BACKEND_CASES
from steering_testing.conformance import conforms
from torch import nn

from vllm.config.steering_points import HookPoint
from vllm.model_executor.layers.steering_families import (
    DecoderLayer,
    decoder_layer_candidates,
    parts_of,
    points_of,
)
from vllm.model_executor.layers.steering_hugging_face import hugging_face_family
from vllm.model_executor.models.transformers import TransformersMultiModalForCausalLM

SUBLAYERS = {HookPoint.ATTN_OUT, HookPoint.MLP_OUT}


def layer_of(config: str, **values: Any) -> nn.Module:
    """The first decoder layer of a Hugging Face model, without weights."""
    made = getattr(transformers, config)(**{**models.COMMON, **values})
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(made)
    return models.decoder_layers(model)[0]


def test_norms_of_what_sublayers_write_are_found() -> None:
    family = hugging_face_family(layer_of("Glm4Config"))
    assert family is not None
    assert family.mid_norm == "post_attention_layernorm"
    assert family.attention_norm == "post_self_attn_layernorm"
    assert family.mlp_norm == "post_mlp_layernorm"


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ("GraniteConfig", "residual_multiplier"),
        ("MiniCPM3Config", "residual_scale"),
    ],
)
def test_a_layer_that_scales_what_its_sublayers_write_lacks_these_points(
    config: str, scale: str
) -> None:
    layer = layer_of(config)
    setattr(layer, scale, 0.5)
    family = hugging_face_family(layer)
    assert family is not None and family.scale == scale
    assert not SUBLAYERS & set(points_of(DecoderLayer(0, layer, family)))
    setattr(layer, scale, 1.0)
    assert set(points_of(DecoderLayer(0, layer, family))) >= SUBLAYERS


def test_a_module_that_does_nothing_is_no_norm() -> None:
    """An SAE of a sublayer's output is refused where a norm follows, and here not."""
    for post_norm in (True, False):
        layer = layer_of("HyperCLOVAXConfig", use_post_norm=post_norm)
        family = hugging_face_family(layer)
        assert family is not None
        parts = parts_of(DecoderLayer(0, layer, family))
        assert (parts.attention_norm is not None) == post_norm
        assert (parts.mlp_norm is not None) == post_norm


@pytest.mark.parametrize("model", ["Doge", "Zaya"])
def test_a_layer_with_other_parts_or_norms_is_not_recognised(model: str) -> None:
    assert hugging_face_family(layer_of(f"{model}Config")) is None


@pytest.mark.parametrize("added", ["adapter", "attn_hc", "weight"])
def test_one_more_part_is_not_recognised(added: str) -> None:
    layer = layer_of("LlamaConfig")
    assert hugging_face_family(layer) is not None
    part = nn.Parameter(torch.ones(1)) if added == "weight" else nn.Linear(1, 1)
    setattr(layer, added, part)
    assert hugging_face_family(layer) is None
    layer.dropout = nn.Dropout()
    delattr(layer, added)
    assert hugging_face_family(layer) is not None


def multimodal(language: str) -> nn.Module:
    """vLLM's class of the backend around a Hugging Face model with a vision tower."""
    model = TransformersMultiModalForCausalLM.__new__(TransformersMultiModalForCausalLM)
    nn.Module.__init__(model)
    text = getattr(transformers, f"{language}TextConfig")(**models.GEMMA)
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 7}
    config = getattr(transformers, f"{language}Config")(
        text_config=text.to_dict(), vision_config={**sizes, "intermediate_size": 48}
    )
    with torch.device("meta"):
        model.model = transformers.AutoModel.from_config(config)
    return model


def test_layers_of_towers_are_none_of_the_models() -> None:
    model = multimodal("Gemma4")
    towers = [
        name
        for name, module in model.named_modules()
        if "tower" in name and hugging_face_family(module) is not None
    ]
    assert len(towers) == 7, "the tower's layers look like decoder layers"
    found = dict(decoder_layer_candidates(model))
    assert list(found) == [f"layers.{at}" for at in range(models.LAYERS)]
    assert {type(layer).__name__ for layer in found.values()} == {
        "Gemma4TextDecoderLayer"
    }


# One with layers that have no rotary embedding; one with norms of outputs.
IN_DEFAULT_SET = {"smollm3", "glm4_backend"}


@pytest.mark.engine
@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=() if name in IN_DEFAULT_SET else pytest.mark.slow)
        for name in BACKEND_CASES
    ],
)
def test_every_tier_at_every_point_equals_hugging_face(
    family: str, model_root: Path, tmp_path: Path
) -> None:
    conforms(BACKEND_CASES[family], model_root, tmp_path)
