# SPDX-License-Identifier: Apache-2.0
"""Transcoders that were trained before the gain of the norm before the MLP."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

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
from steering_testing.reference import (
    DenseSAE,
    Edit,
    random_sae,
    random_transcoder,
)
from steering_testing.shard_engines import RANKS, shared
from torch import nn

from vllm.config.steering_points import HookPoint
from vllm.entrypoints.steering import list_modules, register_module
from vllm.model_executor.layers.steering import SiteKey, SteeringSite
from vllm.model_executor.layers.steering_attach import SteeredNorm, attach_site
from vllm.model_executor.layers.steering_families import DecoderLayer, LayerFamily
from vllm.model_executor.layers.steering_norms import fold_norm_gain, norm_gain
from vllm.model_executor.layers.steering_reference_backend import ReferenceBackend
from vllm.model_executor.layers.steering_state import SAEWeights, StepState, VectorSlot

NORMS = {
    "llama": "post_attention_layernorm",
    "gemma2": "pre_feedforward_layernorm",
    "gpt2": "ln_2",
}
LAYER = 1


def norm_of(family: str, seed: int = 0) -> nn.Module:
    """The Hugging Face model's norm before the MLP of one layer."""
    layer = models.decoder_layers(models.build(family, seed))[LAYER]
    return layer.get_submodule(NORMS[family])


def folded_by_hand(family: str, sae: DenseSAE, seed: int = 0) -> DenseSAE:
    """The transcoder that reads the norm's output after its gain."""
    norm = norm_of(family, seed)
    gain = norm.weight.detach().double() + (family == "gemma2")
    bias = norm.bias.detach().double() if family == "gpt2" else torch.zeros(len(gain))
    W_enc = sae.W_enc / gain
    assert sae.W_skip is not None
    W_skip = sae.W_skip / gain
    b_enc, b_dec = sae.b_enc - W_enc @ bias.double(), sae.b_dec - W_skip @ bias.double()
    return dataclasses.replace(
        sae, W_enc=W_enc, b_enc=b_enc, W_skip=W_skip, b_dec=b_dec
    )


@pytest.mark.engine
@pytest.mark.parametrize(
    "family",
    [
        "gemma2",
        pytest.param("llama", marks=pytest.mark.slow),
        pytest.param("gpt2", marks=pytest.mark.slow),
    ],
)
def test_a_transcoder_from_before_the_gain_reads_what_the_mlp_reads(
    family: str, tmp_path: Path
) -> None:
    sae = random_transcoder(40, "relu", 7, skip=True)
    site = (LAYER, "mlp_in")
    paths = {
        "raw": save_sae(tmp_path / "raw", {site: sae}),
        "before": flagged(save_sae(tmp_path / "before", {site: sae}), "before_gain"),
        "after": save_sae(tmp_path / "after", {site: folded_by_hand(family, sae)}),
    }
    prompt = [3 + i * 5 % 90 for i in range(12)]
    with engine(family, tmp_path, paths) as llm:
        asks = [params(6, **{FULL: [sae_spec(name)]}) for name in paths]
        raw, before, after = generate(llm, [prompt] * len(asks), asks)
    assert before.tokens == after.tokens
    assert before.logprobs == pytest.approx(after.logprobs, abs=1e-4)
    assert raw.logprobs != pytest.approx(after.logprobs, abs=1e-3)


OPTIONS: dict[str, dict[str, Any]] = {
    "eager": {},
    "compiled": {"enforce_eager": False},
    "shared": RANKS,
}


@pytest.mark.engine
@pytest.mark.parametrize(
    "how",
    [
        "eager",
        pytest.param("compiled", marks=pytest.mark.slow),
        pytest.param("shared", marks=pytest.mark.slow),
    ],
)
def test_new_weights_of_the_model_leave_the_modules_and_fold_the_new_gain(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    family, site, point = "gemma2", (LAYER, "mlp_in"), (LAYER, "post_block")
    transcoder = random_transcoder(64, "relu", 7, skip=True)
    sae = random_sae(64, models.HIDDEN, "relu", 3)
    paths = {
        "transcoder": flagged(
            save_sae(tmp_path / "t", {site: transcoder}), "before_gain"
        ),
        "sae": save_sae(tmp_path / "s", {point: sae}),
    }
    prompt = [3 + i * 5 % 90 for i in range(12)]
    asks = [params(6), *(params(6, **{FULL: [sae_spec(name)]}) for name in paths)]
    given = shared(paths) if how == "shared" else paths
    with engine(family, tmp_path, given, **OPTIONS[how]) as llm:
        answers = [generate(llm, [prompt] * len(asks), asks)]
        other = models.save(family, tmp_path, seed=1)
        weights = {"weights_path": str(other)}
        (file,) = Path(paths["transcoder"]).glob("*.safetensors")
        same = file.read_bytes()
        file.write_bytes(same[:-4] + bytes(4))
        if how != "shared":  # where the error is of a rank's process
            with pytest.raises(ValueError, match="'transcoder'.*: found other files"):
                llm.collective_rpc("reload_weights", kwargs=weights)
        file.write_bytes(same)
        llm.collective_rpc("reload_weights", kwargs=weights)
        llm.reset_prefix_cache()
        answers.append(generate(llm, [prompt] * len(asks), asks))
    for seed, found in enumerate(answers):
        read = folded_by_hand(family, transcoder, seed)
        edits = [{}, {site: [Edit("full", read)]}, {point: [Edit("full", sae)]}]
        for one, sites in zip(found, edits, strict=True):
            model = models.build(family, seed)
            expected = oracle.follow(model, prompt, sites, one.tokens)
            assert_same(one, expected, f"seed {seed}, {list(sites)}")


@pytest.mark.engine
@pytest.mark.parametrize(
    ("family", "hook", "fits"),
    [
        pytest.param("llama", "mlp_out", True, marks=pytest.mark.slow),
        ("gemma2", "mlp_out", False),
        pytest.param("gemma2", "attn_out", False, marks=pytest.mark.slow),
        pytest.param("glm4", "mlp_out", False, marks=pytest.mark.slow),
    ],
)
def test_an_sae_of_a_modules_own_output_does_not_fit_a_layer_that_norms_it(
    family: str, hook: str, fits: bool, tmp_path: Path
) -> None:
    sae = random_sae(40, models.HIDDEN, "relu", 3)
    stated = save_sae(tmp_path / "stated", {(LAYER, hook): sae})
    raw = flagged(save_sae(tmp_path / "raw", {(LAYER, hook): sae}), "raw_output")
    paths = {"stated": stated, "raw": raw}
    if not fits:
        with (
            pytest.raises(ValueError, match=f"one of {hook}, which is after the norm"),
            engine(family, tmp_path, paths),
        ):
            pass
        return
    asks = [params(4, **{FULL: [sae_spec(name)]}) for name in paths]
    with engine(family, tmp_path, paths) as llm:
        one, other = generate(llm, [[5, 9, 33]] * 2, asks)
    assert_same(one, other)


@pytest.mark.engine
def test_a_running_engine_refuses_such_an_sae_too(tmp_path: Path) -> None:
    hook = "mlp_out"
    sae = random_sae(40, models.HIDDEN, "relu", 3)
    stated = save_sae(tmp_path / "stated", {(LAYER, hook): sae})
    raw = flagged(save_sae(tmp_path / "raw", {(LAYER, hook): sae}), "raw_output")
    spare = [{"layer": LAYER, "hook": hook, "width": 40}] * 2
    with engine("gemma2", tmp_path, {}, {"spare": spare}) as llm:
        register_module(llm, "stated", stated)
        with pytest.raises(ValueError, match=f"one of {hook}, which is after the norm"):
            register_module(llm, "raw", raw)
        assert list(list_modules(llm)) == ["stated"]


def test_a_gain_too_small_to_divide_by_is_refused() -> None:
    norm = nn.RMSNorm(8)
    with torch.no_grad():
        norm.weight[3] = 0
    weights = SAEWeights(4, 8, torch.float32, torch.device("cpu"))
    weights.W_enc.fill_(1)
    with pytest.raises(ValueError, match="a gain of RMSNorm is too small"):
        fold_norm_gain(weights, 4, norm)
    with pytest.raises(ValueError, match="needs a layer with a norm before the MLP"):
        fold_norm_gain(weights, 4, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_of_another_kind_is_refused(dtype: torch.dtype) -> None:
    class Twice(nn.RMSNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    plain, twice = nn.RMSNorm(8, dtype=dtype), Twice(8, dtype=dtype)
    with torch.no_grad():
        plain.weight.uniform_(0.5, 1.5)
        twice.weight.uniform_(1.5, 2.5)
    gain, bias = norm_gain(plain)
    assert torch.equal(gain, plain.weight.detach().float()) and bias is None
    with pytest.raises(ValueError, match="neither by its weight nor by 1 . weight"):
        norm_gain(twice)


def test_the_gain_of_a_norm_with_a_site_is_that_of_the_stock_norm() -> None:
    norm = nn.RMSNorm(8)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
    expected, _ = norm_gain(norm)
    layer = nn.Module()
    layer.norm = norm
    family = LayerFamily(mid_norm="norm")
    cpu = torch.device("cpu")
    step, slot = StepState(8, cpu), VectorSlot(1, 8, 3, 4, cpu)
    key = SiteKey(1, HookPoint.POST_ATTN)
    site = SteeringSite(key, [], slot, step, ReferenceBackend(step))
    attach_site(DecoderLayer(1, layer, family), site)
    assert isinstance(norm, SteeredNorm)
    assert torch.equal(norm_gain(norm)[0], expected)
    with pytest.raises(AssertionError, match="Forward context is not set"):
        norm(torch.ones(1, 8))
