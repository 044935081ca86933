# SPDX-License-Identifier: Apache-2.0
"""SAEs of attention's `z` that were trained without the bias of the values."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from steering_testing import models, oracle
from steering_testing.engine import (
    FULL,
    assert_same,
    engine,
    flagged,
    generate,
    params,
    sae_spec,
    save_sae,
)
from steering_testing.reference import DenseSAE, Edit, random_sae
from torch import nn

from vllm.entrypoints.steering import register_module
from vllm.model_executor.layers.steering_value_bias import fold_value_bias

LAYER, HOOK, FEATURES = 1, "attn_z", 40
PROMPT = [3 + i * 5 % 90 for i in range(12)]


def bias_of(family: str) -> torch.Tensor:
    """The bias in `z` of the Hugging Face model, float64 `[z]`."""
    layer = models.decoder_layers(models.build(family))[LAYER]
    if family == "gpt2":
        return layer.attn.c_attn.bias.detach().double().chunk(3)[2]
    attention, config = layer.self_attn, layer.self_attn.config
    heads = attention.v_proj.bias.detach().double().view(-1, attention.head_dim)
    copies = config.num_attention_heads // config.num_key_value_heads
    return heads.repeat_interleave(copies, dim=0).flatten()


def folded_by_hand(sae: DenseSAE, bias: torch.Tensor) -> DenseSAE:
    b_enc, b_dec = sae.b_enc - sae.W_enc @ bias, sae.b_dec + bias
    return dataclasses.replace(sae, b_enc=b_enc, b_dec=b_dec)


def test_the_folded_sae_of_z_is_the_sae_of_z_less_the_bias() -> None:
    bias, z = torch.randn(64).double(), torch.randn(64).double()
    sae = random_sae(FEATURES, 64, "relu", 3)
    folded = folded_by_hand(sae, bias)
    assert torch.allclose(folded.encode(z), sae.encode(z - bias))
    own = sae.encode(z - bias) @ sae.W_dec + sae.b_dec
    there = folded.encode(z) @ folded.W_dec + folded.b_dec
    assert torch.allclose(there, own + bias)


@pytest.mark.engine
@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_an_sae_without_the_values_bias_reads_z_without_it(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "BIASED", {family})
    bias = bias_of(family)
    assert bias.abs().min() > 0
    sae = random_sae(FEATURES, len(bias), "relu", 3)
    site = (LAYER, HOOK)
    native = save_sae(tmp_path / "without", {site: sae})
    paths = {
        "with": save_sae(tmp_path / "with", {site: sae}),
        "without": flagged(native, "before_value_bias"),
    }
    spare = {"spare": [{"layer": LAYER, "hook": HOOK, "width": FEATURES}]}
    with engine(family, tmp_path, paths, spare) as llm:
        register_module(llm, "later", paths["without"])
        asks = [params(6, **{FULL: [sae_spec(n)]}) for n in (*paths, "later")]
        plain, without, later = generate(llm, [PROMPT] * len(asks), asks)
    assert without == later
    assert plain.logprobs != pytest.approx(without.logprobs, abs=1e-3)
    edits = {site: [Edit("full", folded_by_hand(sae, bias))]}
    expected = oracle.follow(models.build(family), PROMPT, edits, without.tokens)
    assert_same(without, expected)


def test_attention_whose_values_are_unknown_is_refused() -> None:
    class Attention(nn.Module):
        pass

    for attention in (None, Attention()):
        with pytest.raises(ValueError, match="one projection of queries, keys and"):
            fold_value_bias(None, 4, attention)  # type: ignore[arg-type]
