# SPDX-License-Identifier: Apache-2.0
"""Formats of SAEs on sublayers and of transcoders, against mathematics in float64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from example_weights import (
    SAE,
    TRANSCODER,
    W_dec,
    W_enc,
    W_skip,
    b_dec,
    b_enc,
    decode,
    is_transcoder,
    jump,
    pre,
    site_of,
    threshold,
    transcode,
)
from llama_scope_files import save_llama_scope
from sae_reference import (
    D,
    F,
    K,
    close,
    inputs,
    reconstruct,
    topk_mask,
    write_json,
)
from safetensors.torch import save_file

from vllm.config.steering_points import HookPoint
from vllm.model_executor.model_loader.sae_loader import inspect_module

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
    assert site_of(path).raw_output
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
    # What a layer may norm before it adds it; the stream is not.
    assert site_of(path).raw_output == (folder != "h.6")
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


# A list of 9^12 items; whoever looks at all of them is not seen again.
REPEATED = "a0: &b0 [1]\n" + "".join(
    f"a{at}: &b{at} [{','.join([f'*b{at - 1}'] * 9)}]\n" for at in range(1, 13)
)
REPEATED += "model_name: *b12\n"
QWEN3 = "model_name: Qwen/Qwen3-4B\nfeature_input_hook: mlp.hook_in\n"


def test_a_transcoder_set_may_read_before_the_gain(tmp_path: Path) -> None:
    path = transcoder_set(
        tmp_path / "set", False, "feature_input_hook: ln2.hook_normalized"
    )
    assert all(site.before_gain for site in inspect_module("m", str(path)).sites)


@pytest.mark.parametrize(
    ("hook", "raw"), [("mlp.hook_out", True), ("hook_mlp_out", False)]
)
def test_a_transcoder_set_may_write_the_output_of_the_mlp_itself(
    tmp_path: Path, hook: str, raw: bool
) -> None:
    config = f"{QWEN3}feature_output_hook: {hook}"
    sites = inspect_module("m", str(transcoder_set(tmp_path / "set", False, config)))
    assert [site.raw_output for site in sites.sites] == [raw, raw]


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
        ("x: 1\ny: 2\nx: 3", "config.yaml: .*'x' is given twice, expected once"),
        ("x: " + "y" * 70_000, "config.yaml: expected at most 65536 bytes"),
        (REPEATED, r"model_name: expected a string, found \[\[\[\[\.\.\.\]"),
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
    assert site_of(path).name == "attn_z.5" and site_of(path).before_value_bias
    close(reconstruct(path), decode(pre(inputs() - b_dec.double()).relu()))
    assert inspect_module("m", str(path)).format == "attention_z"


# Llama Scope and llamascopium


LINEAR = {
    "encoder.weight": W_enc,
    "encoder.bias": b_enc,
    "decoder.weight": W_dec.T.contiguous(),
    "decoder.bias": b_dec,
    "log_jumprelu_threshold": threshold,
}
# What the package itself saves.
PLAIN = {
    "W_E": W_enc.T.contiguous(),
    "b_E": b_enc,
    "W_D": W_dec,
    "b_D": b_dec,
    "activation_function.log_jumprelu_threshold": threshold,
}


def llamascopium(
    path: Path,
    norms: dict[str, float],
    tensors: dict[str, torch.Tensor] = LINEAR,
    **config: Any,
) -> Path:
    hook = "blocks.12.hook_resid_post"
    base = {
        "sae_type": "sae",
        "d_model": D,
        "expansion_factor": F / D,
        "hook_point_in": hook,
        "hook_point_out": hook,
        "act_fn": "jumprelu",
        "norm_activation": "dataset-wise" if norms else "inference",
    }
    write_json(path / "config.json", {**base, **config})
    stored = {
        f"dataset_average_activation_norm.{name}": torch.tensor(norm)
        for name, norm in norms.items()
    }
    save_file({**tensors, **stored}, path / "sae_weights.safetensors")
    return path


@pytest.mark.parametrize("tensors", [LINEAR, PLAIN], ids=["linear", "plain"])
@pytest.mark.parametrize("by_norm", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_llamascopium_has_logarithms_of_thresholds(
    tmp_path: Path, by_norm: bool, scaled: bool, tensors: dict[str, torch.Tensor]
) -> None:
    norms = {"blocks.12.hook_resid_post": 3.0} if scaled else {}
    s = math.sqrt(D) / 3.0 if scaled else 1.0
    path = llamascopium(tmp_path, norms, tensors, sparsity_include_decoder_norm=by_norm)
    p = pre(inputs() * s)
    gate = p * W_dec.double().norm(dim=1) if by_norm else p
    close(reconstruct(path), decode(p * (gate > threshold.double().exp())) / s)
    assert site_of(path).name == "post_block.12"


def test_a_llamascopium_transcoder_scales_input_and_output_apart(
    tmp_path: Path,
) -> None:
    hook_in, hook_out = "blocks.12.ln2.hook_normalized", "blocks.12.hook_mlp_out"
    path = llamascopium(
        tmp_path,
        {hook_in: 3.0, hook_out: 2.0},
        {name: value for name, value in PLAIN.items() if name != "b_D"},
        hook_point_in=hook_in,
        hook_point_out=hook_out,
        act_fn="topk",
        top_k=K,
        use_decoder_bias=False,
    )
    p = pre(inputs() * math.sqrt(D) / 3.0)
    f = p.relu() * topk_mask(p * W_dec.double().norm(dim=1), K)
    close(reconstruct(path), f @ W_dec.double() / (math.sqrt(D) / 2.0))
    site = site_of(path)
    assert (site.name, site.out_hook, site.before_gain) == (
        "mlp_in.12",
        HookPoint.MLP_OUT,
        True,
    )


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
        (
            {"apply_decoder_bias_to_pre_encoder": True},
            "apply_decoder_bias_to_pre_encoder: expected false",
        ),
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
    hook = f"blocks.4.hook_{point}"
    save_llama_scope(
        tmp_path,
        *(W_enc, b_enc, W_dec, b_dec),
        hook_point_in=hook,
        hook_point_out=hook,
        act_fn="relu",
        norm_activation="none",
        sparsity_include_decoder_norm=False,
    )
    assert site_of(tmp_path).name == f"{point}.4"
    close(reconstruct(tmp_path), decode(pre().relu()))
