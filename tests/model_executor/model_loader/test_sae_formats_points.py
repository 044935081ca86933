# SPDX-License-Identifier: Apache-2.0
"""Formats of SAEs on sublayers and of transcoders, against mathematics in float64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sae_reference import (
    D,
    F,
    K,
    close,
    inputs,
    reconstruct,
    tensor,
    topk_mask,
    write_json,
)
from safetensors.torch import save_file

from vllm.config.steering import HookPoint, SiteInfo
from vllm.model_executor.model_loader.sae_loader import inspect_module

D_OUT = 6
W_enc = tensor(F, D, seed=10)
W_dec = tensor(F, D, seed=11) * torch.linspace(0.3, 2, F)[:, None]
W_out = tensor(F, D_OUT, seed=18)
W_skip = tensor(D_OUT, D, seed=19)
b_enc, b_dec, b_out = tensor(F, seed=12), tensor(D, seed=13), tensor(D_OUT, seed=20)
threshold = tensor(F, seed=14)

SAE = {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec}
TRANSCODER = {"W_enc": W_enc, "W_dec": W_out, "b_enc": b_enc, "b_dec": b_out}


def pre(x: torch.Tensor | None = None) -> torch.Tensor:
    x = inputs() if x is None else x
    return x @ W_enc.double().T + b_enc.double()


def jump(p: torch.Tensor) -> torch.Tensor:
    return p * (p > threshold.double().clamp(min=0))


def decode(f: torch.Tensor) -> torch.Tensor:
    return f @ W_dec.double() + b_dec.double()


def transcode(f: torch.Tensor, skip: bool) -> torch.Tensor:
    y = f @ W_out.double() + b_out.double()
    return y + inputs() @ W_skip.double().T if skip else y


def site_of(path: Path, **options: Any) -> SiteInfo:
    (site,) = inspect_module("m", str(path), **options).sites
    return site


def is_transcoder(site: SiteInfo, layer: int, skip: bool) -> bool:
    points = (site.layer, site.hook, site.out_hook)
    return (*points, site.out_width, site.has_skip) == (
        layer,
        HookPoint.MLP_IN,
        HookPoint.MLP_OUT,
        D_OUT,
        skip,
    )


# Gemma Scope


def gemma_scope(path: Path) -> Path:
    path.mkdir(parents=True)
    arrays = {k: v.numpy() for k, v in SAE.items()}
    arrays["W_enc"] = arrays["W_enc"].T
    np.savez(path / "params.npz", threshold=threshold.numpy(), **arrays)
    return path


@pytest.mark.parametrize(
    ("repo", "name"),
    [("mlp", "mlp_out.3"), ("att", "attn_z.3"), ("res", "post_block.3")],
)
def test_gemma_scope_says_its_point_by_the_repository(
    tmp_path: Path, repo: str, name: str
) -> None:
    path = gemma_scope(tmp_path / f"gemma-scope-2b-pt-{repo}/layer_3/width_16k/l0_7")
    assert site_of(path).name == name
    close(reconstruct(path), decode(jump(pre())))


def test_gemma_scope_of_embeddings_reads_them_before_their_scale(
    tmp_path: Path,
) -> None:
    path = gemma_scope(tmp_path / "gemma-scope-2b-pt-res/embedding/width_4k/l0_6")
    assert site_of(path).name == "pre_attn.0"
    s = math.sqrt(D)
    close(reconstruct(path), decode(jump(pre(inputs() / s))) * s)


def test_gemma_scope_transcoders_read_before_the_gain(tmp_path: Path) -> None:
    path = gemma_scope(tmp_path / "gemma-scope-2b-pt-transcoders/layer_3")
    site = site_of(path)
    assert (site.name, site.out_hook) == ("mlp_in.3", HookPoint.MLP_OUT)
    assert site.before_gain
    close(reconstruct(path), decode(jump(pre())))


def gemma_scope_2(path: Path, skip: bool, **config: Any) -> Path:
    path.mkdir(parents=True)
    tensors = {key.lower(): value for key, value in TRANSCODER.items()}
    tensors |= {"w_enc": W_enc.T.contiguous(), "threshold": threshold}
    if skip:
        tensors["affine_skip_connection"] = W_skip.T.contiguous()
    save_file(tensors, path / "params.safetensors")
    if config:
        write_json(path / "config.json", {"architecture": "jump_relu", **config})
    return path


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("configured", [False, True])
def test_gemma_scope_2_has_transcoders(
    tmp_path: Path, skip: bool, configured: bool
) -> None:
    config = {
        "hf_hook_point_in": "model.layers.5.pre_feedforward_layernorm.output",
        "hf_hook_point_out": "model.layers.5.post_feedforward_layernorm.output",
        "affine_connection": skip,
    }
    folder = "x" if configured else "transcoder_all/layer_5_width_16k_l0_big"
    path = gemma_scope_2(tmp_path / folder, skip, **(config if configured else {}))
    assert is_transcoder(site_of(path), 5, skip)
    close(reconstruct(path), transcode(jump(pre()), skip))


@pytest.mark.parametrize("kind", ["crosscoder", "clt"])
def test_gemma_scope_2_refuses_what_spans_layers(tmp_path: Path, kind: str) -> None:
    path = gemma_scope_2(tmp_path / kind / "layer_5_width_16k", False)
    with pytest.raises(ValueError, match=f"{kind}: a cross"):
        inspect_module("m", str(path))


# sparsify


def sparsify(path: Path, tensors: dict[str, torch.Tensor], **cfg: Any) -> Path:
    write_json(path / "cfg.json", {"d_in": D, "k": K, **cfg})
    names = {"W_enc": "encoder.weight", "b_enc": "encoder.bias"}
    stored = {names.get(key, key): value for key, value in tensors.items()}
    save_file(stored, path / "sae.safetensors")
    return path


@pytest.mark.parametrize("skip", [False, True])
def test_a_sparsify_transcoder_does_not_subtract_its_bias(
    tmp_path: Path, skip: bool
) -> None:
    tensors = {**TRANSCODER, **({"W_skip": W_skip} if skip else {})}
    cfg = {"transcode": True, "skip_connection": skip}
    path = sparsify(tmp_path / "layers.6.mlp", tensors, **cfg)
    assert is_transcoder(site_of(path), 6, skip)
    p = pre().relu()
    close(reconstruct(path), transcode(p * topk_mask(p, K), skip))


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("layers.6.mlp", "mlp_out.6"),
        ("gpt_neox.layers.6.attention", "attn_out.6"),
        ("h.6", "post_block.6"),
    ],
)
def test_a_sparsify_folder_names_the_module_whose_output_is_read(
    tmp_path: Path, folder: str, name: str
) -> None:
    path = sparsify(tmp_path / folder, SAE)
    assert site_of(path).name == name
    p = pre(inputs() - b_dec.double()).relu()
    close(reconstruct(path), decode(p * topk_mask(p, K)))


# Transcoder sets


def transcoder_set(path: Path, skip: bool, config: str) -> Path:
    path.mkdir()
    extra = {"W_skip": W_skip} if skip else {}
    for layer in (3, 12):
        save_file({**TRANSCODER, **extra}, path / f"layer_{layer}.safetensors")
    (path / "config.yaml").write_text(config)
    return path


QWEN3 = "model_name: Qwen/Qwen3-4B\nfeature_input_hook: mlp.hook_in\n"


def test_a_transcoder_set_may_read_before_the_gain(tmp_path: Path) -> None:
    path = transcoder_set(
        tmp_path / "set", False, "feature_input_hook: ln2.hook_normalized"
    )
    assert all(site.before_gain for site in inspect_module("m", str(path)).sites)


@pytest.mark.parametrize("skip", [False, True])
def test_a_transcoder_set_has_a_site_for_each_layer(tmp_path: Path, skip: bool) -> None:
    path = transcoder_set(tmp_path / "set", skip, QWEN3)
    sites = inspect_module("m", str(path)).sites
    assert [site.name for site in sites] == ["mlp_in.3", "mlp_in.12"]
    one = path / "layer_12.safetensors"
    assert is_transcoder(site_of(one), 12, skip)
    close(reconstruct(one), transcode(pre().relu(), skip))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("feature_input_hook: hook_resid_mid", "feature_input_hook: expected one of"),
        ("- 1", "config.yaml: expected a mapping"),
        ("x: [", "config.yaml: cannot be read as YAML"),
        ("x: " + "y" * 70_000, "config.yaml: expected at most 65536 bytes"),
    ],
)
def test_a_transcoder_set_that_reads_another_point_is_refused(
    tmp_path: Path, config: str, message: str
) -> None:
    path = transcoder_set(tmp_path / "set", False, config)
    with pytest.raises(ValueError, match=message):
        inspect_module("m", str(path))


# Attention SAEs of Kissane et al.


def test_an_attention_sae_is_beside_its_configuration(tmp_path: Path) -> None:
    path = tmp_path / "gpt2-small_L5_Hcat_z.pt"
    torch.save({**SAE, "W_enc": W_enc.T}, path)
    cfg = {"act_name": "blocks.5.attn.hook_z", "act_size": D, "dict_size": F}
    write_json(tmp_path / "gpt2-small_L5_Hcat_z_cfg.json", cfg)
    assert site_of(path).name == "attn_z.5"
    close(reconstruct(path), decode(pre(inputs() - b_dec.double()).relu()))
    assert inspect_module("m", str(path)).format == "attention_z"


# SAELens


def sae_lens(path: Path, tensors: dict[str, torch.Tensor], **cfg: Any) -> Path:
    stored = {**tensors, "W_enc": W_enc.T.contiguous()}
    path.mkdir(parents=True, exist_ok=True)
    save_file(stored, path / "sae_weights.safetensors")
    write_json(path / "cfg.json", {"d_in": D, "d_sae": F, **cfg})
    return path


@pytest.mark.parametrize("jumps", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_sae_lens_has_transcoders(tmp_path: Path, jumps: bool, skip: bool) -> None:
    kind = "skip_transcoder" if skip else "transcoder"
    tensors = {**TRANSCODER, **({"W_skip": W_skip} if skip else {})}
    if jumps:
        kind, tensors["threshold"] = f"jumprelu_{kind}", threshold
    points = {
        "hook_name": "blocks.7.mlp.hook_in",
        "hook_name_out": "blocks.7.hook_mlp_out",
    }
    path = sae_lens(tmp_path, tensors, architecture=kind, d_out=D_OUT, metadata=points)
    assert is_transcoder(site_of(path), 7, skip)
    f = jump(pre()) if jumps else pre().relu()
    close(reconstruct(path), transcode(f, skip))


def test_a_sae_lens_transcoder_may_read_before_the_gain(tmp_path: Path) -> None:
    points = {
        "hook_name": "blocks.7.ln2.hook_normalized",
        "hook_name_out": "blocks.7.hook_mlp_out",
    }
    cfg = {"architecture": "transcoder", "metadata": points}
    site = site_of(sae_lens(tmp_path, TRANSCODER, **cfg))
    assert is_transcoder(site, 7, False) and site.before_gain


def test_a_hugging_face_name_decides_where_transformer_lens_is_unclear(
    tmp_path: Path,
) -> None:
    points = {
        "hook_name": "blocks.7.hook_mlp_in",
        "hook_name_out": "blocks.7.hook_mlp_out",
        "hf_hook_name": "model.layers.7.pre_feedforward_layernorm.output",
    }
    cfg = {"architecture": "transcoder", "metadata": points}
    assert is_transcoder(site_of(sae_lens(tmp_path, TRANSCODER, **cfg)), 7, False)


def test_sae_lens_with_hook_z_reads_all_heads(tmp_path: Path) -> None:
    cfg = {"hook_name": "blocks.3.attn.hook_z", "reshape_activations": "hook_z"}
    path = sae_lens(tmp_path, SAE, **cfg, apply_b_dec_to_input=False)
    assert site_of(path).name == "attn_z.3"
    close(reconstruct(path), decode(pre().relu()))


@pytest.mark.parametrize("subtract", [False, True])
def test_what_only_the_release_list_says_is_folded(
    tmp_path: Path, subtract: bool
) -> None:
    root = tmp_path / "GPT2-Small-SAEs-Reformatted/blocks.3.hook_resid_pre"
    cfg = {"hook_name": "blocks.3.hook_resid_pre", "apply_b_dec_to_input": subtract}
    x = inputs() - inputs().mean(dim=1, keepdim=True)
    expected = decode(pre(x - b_dec.double() * subtract).relu())
    close(reconstruct(sae_lens(root, SAE, **cfg)), expected)


def test_a_normalisation_that_only_the_release_list_says_is_refused(
    tmp_path: Path,
) -> None:
    root = tmp_path / "Mistral-7B-Residual-Stream-SAEs/mistral_7b_layer_8"
    path = sae_lens(root, SAE, hook_name="blocks.8.hook_resid_pre")
    with pytest.raises(ValueError, match="found 'constant_norm_rescale' .per-token"):
        inspect_module("m", str(path))


def test_a_factor_that_only_the_release_list_says_is_folded(tmp_path: Path) -> None:
    folder = "gpt2-small-mlp-out-saes/sae_group_gpt2_blocks.0.hook_mlp_out_24576:v1"
    cfg = {
        "hook_name": "blocks.0.hook_mlp_out",
        "normalize_activations": "expected_average_only_in",
        "apply_b_dec_to_input": False,
    }
    path = sae_lens(tmp_path / folder, SAE, **cfg)
    s = 1.049317316132615
    x = inputs() * s
    x = x - x.mean(dim=1, keepdim=True)
    close(reconstruct(path), decode(pre(x).relu()) / s)


# Llama Scope and llamascopium


def llamascopium(path: Path, norms: dict[str, float], **config: Any) -> Path:
    base = {
        "sae_type": "sae",
        "d_model": D,
        "expansion_factor": F / D,
        "hook_point_in": "blocks.12.hook_resid_post",
        "hook_point_out": "blocks.12.hook_resid_post",
        "act_fn": "jumprelu",
        "norm_activation": "dataset-wise" if norms else "inference",
    }
    write_json(path / "config.json", {**base, **config})
    tensors = {
        "encoder.weight": W_enc,
        "encoder.bias": b_enc,
        "decoder.weight": W_dec.T.contiguous(),
        "decoder.bias": b_dec,
        "log_jumprelu_threshold": threshold,
    }
    for name, norm in norms.items():
        key = f"dataset_average_activation_norm.{name}"
        tensors[key] = torch.tensor([norm])
    save_file(tensors, path / "sae_weights.safetensors")
    return path


@pytest.mark.parametrize("by_norm", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_llamascopium_has_logarithms_of_thresholds(
    tmp_path: Path, by_norm: bool, scaled: bool
) -> None:
    norms = {"blocks.12.hook_resid_post": 3.0} if scaled else {}
    s = math.sqrt(D) / 3.0 if scaled else 1.0
    path = llamascopium(tmp_path, norms, sparsity_include_decoder_norm=by_norm)
    p = pre(inputs() * s)
    gate = p * W_dec.double().norm(dim=1) if by_norm else p
    close(reconstruct(path), decode(p * (gate > threshold.double().exp())) / s)
    assert site_of(path).name == "post_block.12"


def test_llamascopium_takes_its_factor_from_the_release_list(tmp_path: Path) -> None:
    folder = "Llama-Scope-R1-Distill/800M-Slimpajama-0-OpenR1-Math-220k/L0R"
    config = {"norm_activation": "dataset-wise", "sparsity_include_decoder_norm": False}
    path = llamascopium(tmp_path / folder, {}, **config)
    s = 53.52995401997436
    p = pre(inputs() * s)
    close(reconstruct(path), decode(p * (p > threshold.double().exp())) / s)
    alone = llamascopium(tmp_path / "alone", {}, **config)
    with pytest.raises(
        ValueError, match="norm_activation is dataset-wise, expected th"
    ):
        inspect_module("m", str(alone))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"sae_type": "crosscoder"}, "sae_type: expected sae"),
        ({"use_glu_encoder": True}, "use_glu_encoder: expected false"),
        ({"norm_activation": "token-wise"}, "norm_activation: expected dataset-wise"),
        ({"act_fn": "batchtopk"}, "act_fn: expected relu, jumprelu or topk"),
    ],
)
def test_llamascopium_refuses_what_does_not_fold(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        inspect_module("m", str(llamascopium(tmp_path, {}, **config)))


@pytest.mark.parametrize("point", ["attn_out", "mlp_out"])
def test_llama_scope_has_saes_on_sublayers(tmp_path: Path, point: str) -> None:
    config = {
        "hook_point_in": f"blocks.4.hook_{point}",
        "hook_point_out": f"blocks.4.hook_{point}",
        "act_fn": "relu",
        "norm_activation": "none",
        "sparsity_include_decoder_norm": False,
    }
    write_json(tmp_path / "hyperparams.json", config)
    (tmp_path / "checkpoints").mkdir()
    tensors = {
        "encoder.weight": W_enc,
        "encoder.bias": b_enc,
        "decoder.weight": W_dec.T.contiguous(),
        "decoder.bias": b_dec,
    }
    save_file(tensors, tmp_path / "checkpoints/final.safetensors")
    assert site_of(tmp_path).name == f"{point}.4"
    close(reconstruct(tmp_path), decode(pre().relu()))
