# SPDX-License-Identifier: Apache-2.0
"""What the sae-lens package saves reconstructs as sae-lens does (where installed)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sae_reference import D, F, K, inputs, reconstruct

from vllm.model_executor.model_loader.sae_loader import inspect_module

sae_lens = pytest.importorskip("sae_lens", reason="needs the sae-lens package")
from sae_lens.saes.sae import SAEMetadata  # noqa: E402


def common(**options: Any) -> dict[str, Any]:
    metadata = SAEMetadata(hook_name="blocks.5.hook_resid_post", model_name="tiny")
    return {"d_in": D, "d_sae": F, "dtype": "float32", "metadata": metadata, **options}


def randomise(sae: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in sae.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.4)


def agrees(sae: Any, path: Path) -> None:
    sae.dtype = torch.float64
    with torch.no_grad():
        expected = sae.double()(inputs())
    found = reconstruct(path)
    assert expected.std() > 0.01
    error = (found - expected).abs().max() / expected.abs().max()
    assert float(error) < 1e-6


@pytest.mark.parametrize(
    "name",
    [
        "transcoder",
        "skip_transcoder",
        "jumprelu_transcoder",
        "jumprelu_skip_transcoder",
    ],
)
def test_a_transcoder_reconstructs_the_same(tmp_path: Path, name: str) -> None:
    sae_class, config_class = sae_lens.registry.get_sae_class(name)
    metadata = SAEMetadata(
        hook_name="blocks.5.mlp.hook_in",
        hook_name_out="blocks.5.hook_mlp_out",
        model_name="tiny",
    )
    options = common(d_out=6, apply_b_dec_to_input=False, metadata=metadata)
    sae = sae_class(config_class(**options))
    randomise(sae)
    sae.save_model(tmp_path)
    agrees(sae, tmp_path)
    (site,) = inspect_module("m", str(tmp_path)).sites
    assert (site.out_width, site.has_skip) == (6, "skip" in name)


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("name", ["standard", "jumprelu", "topk", "gated"])
def test_an_inference_sae_reconstructs_the_same(
    tmp_path: Path, name: str, subtract: bool
) -> None:
    sae_class, config_class = sae_lens.registry.get_sae_class(name)
    extra = {"k": K} if name == "topk" else {}
    sae = sae_class(config_class(**common(apply_b_dec_to_input=subtract, **extra)))
    randomise(sae)
    sae.save_model(tmp_path)
    agrees(sae, tmp_path)


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("name", ["topk", "batchtopk", "matryoshka_batchtopk"])
@pytest.mark.parametrize("scale", [None, 2.5])
def test_a_trained_sae_saved_for_inference_reconstructs_the_same(
    tmp_path: Path, name: str, rescale: bool, scale: float | None
) -> None:
    sae_class, config_class = sae_lens.registry.get_sae_training_class(name)
    extra: dict[str, Any] = {"k": K, "rescale_acts_by_decoder_norm": rescale}
    if name.startswith("matryoshka"):
        extra["matryoshka_widths"] = [8, F]
    sae = sae_class(config_class(**common(**extra)))
    randomise(sae)
    if name != "topk":
        sae.topk_threshold.fill_(0.6)
    if scale is not None:
        sae.fold_activation_norm_scaling_factor(scale)
    sae.save_inference_model(tmp_path)
    agrees(sae_lens.SAE.load_from_disk(tmp_path), tmp_path)


@pytest.mark.parametrize("rescale", [True, False])
def test_a_batchtopk_checkpoint_reconstructs_as_its_inference_form(
    tmp_path: Path, rescale: bool
) -> None:
    sae_class, config_class = sae_lens.registry.get_sae_training_class("batchtopk")
    options = common(k=K, rescale_acts_by_decoder_norm=rescale)
    sae = sae_class(config_class(**options))
    randomise(sae)
    sae.topk_threshold.fill_(0.6)
    sae.save_model(tmp_path / "checkpoint")
    sae.save_inference_model(tmp_path / "final")
    agrees(sae_lens.SAE.load_from_disk(tmp_path / "final"), tmp_path / "checkpoint")


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("transcode", [False, True])
def test_a_sparsify_coder_reconstructs_the_same(
    tmp_path: Path, transcode: bool, skip: bool
) -> None:
    sparsify = pytest.importorskip("sparsify", reason="needs eai-sparsify")
    config = sparsify.SparseCoderConfig(
        num_latents=F, k=K, transcode=transcode, skip_connection=skip and transcode
    )
    coder = sparsify.SparseCoder(D, config)
    randomise(coder)
    path = tmp_path / "layers.5.mlp"
    coder.save_to_disk(path)
    # Its forward pass casts to bfloat16 where it can; the parts do not.
    with torch.no_grad():
        encoded = coder.double().encode(inputs())
        expected = coder.decode(encoded.top_acts, encoded.top_indices)
        if coder.W_skip is not None:
            expected = expected + inputs() @ coder.W_skip.mT
    error = (reconstruct(path) - expected).abs().max() / expected.abs().max()
    assert float(error) < 1e-6
