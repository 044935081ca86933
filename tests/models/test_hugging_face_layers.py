# SPDX-License-Identifier: Apache-2.0
"""Layers of Hugging Face whose parts have the names of others, and do other things."""

from __future__ import annotations

import pytest
import torch
from steering_testing import models
from torch import nn
from transformers import ChameleonConfig, EsmcConfig, OpenAIGPTConfig
from transformers.models.chameleon.modeling_chameleon import (
    ChameleonDecoderLayer,
    ChameleonSwinDecoderLayer,
)
from transformers.models.esmc.modeling_esmc import EsmcLayer
from transformers.models.openai.modeling_openai import Block

from vllm.config.steering_points import HookPoint
from vllm.model_executor.layers.steering_families import DecoderLayer, points_of
from vllm.model_executor.layers.steering_hugging_face import hugging_face_family


def chameleon(cls: type[nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return cls(ChameleonConfig(**models.COMMON), 0)


def test_chameleons_norms_of_outputs_are_not_taken_for_norms_of_inputs() -> None:
    stock = hugging_face_family(chameleon(ChameleonDecoderLayer))
    assert stock is not None and stock.mid_norm == "post_attention_layernorm"
    assert hugging_face_family(chameleon(ChameleonSwinDecoderLayer)) is None


def test_gpts_norms_of_the_sum_are_not_taken_for_norms_of_inputs() -> None:
    with torch.device("meta"):
        layer = Block(64, OpenAIGPTConfig(n_embd=64, n_head=2))
    assert hugging_face_family(layer) is None


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_a_divisor_of_what_sublayers_write_takes_their_points_away(
    factor: float,
) -> None:
    with torch.device("meta"):
        layer = EsmcLayer(EsmcConfig(hidden_size=64, num_attention_heads=2), 0)
    layer.scaling_factor = factor
    family = hugging_face_family(layer)
    assert family is not None
    points = set(points_of(DecoderLayer(0, layer, family)))
    assert (HookPoint.MLP_OUT in points) == (factor == 1.0)
