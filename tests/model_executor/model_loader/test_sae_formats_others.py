# SPDX-License-Identifier: Apache-2.0
"""Every other file format against its class's own mathematics in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from example_weights import (
    W_dec,
    W_enc,
    b_dec,
    b_enc,
    decode,
    pre_activations,
    threshold,
)
from llama_scope_files import save_llama_scope
from sae_reference import (
    D,
    F,
    K,
    canonical,
    close,
    inputs,
    loaded,
    new_weights,
    reconstruct,
    topk_mask,
    write_json,
)
from safetensors.torch import save_file

from vllm.config.steering import Activation
from vllm.config.steering_points import HookPoint
from vllm.model_executor.model_loader.sae_loader import inspect_module, load_site

# Gemma Scope


def gemma_scope(path: Path, save: Any = np.savez) -> Path:
    path.mkdir(parents=True)
    save(
        path / "params.npz",
        W_enc=W_enc.T.contiguous().numpy(),
        W_dec=W_dec.numpy(),
        b_enc=b_enc.numpy(),
        b_dec=b_dec.numpy(),
        threshold=threshold.numpy(),
    )
    return path


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_gemma_scope_is_jumprelu_without_an_input_bias(
    tmp_path: Path, save: Any
) -> None:
    path = gemma_scope(
        tmp_path / "gemma-scope-2b-pt-res/layer_20/width_16k/l0_71", save
    )
    p = pre_activations(subtract=False)
    close(reconstruct(path), decode(p.relu() * (p > threshold.double())))


def test_gemma_scope_has_its_layer_in_the_path(tmp_path: Path) -> None:
    path = gemma_scope(tmp_path / "gemma-scope-2b-pt-res/layer_20/width_16k/l0_71")
    assert inspect_module("m", str(path)).sites[0].name == "post_block.20"


@pytest.mark.parametrize("folder", ["sae", "layer_4/width_16k/average_l0_71"])
def test_gemma_scope_without_its_kind_in_its_path_needs_a_site(
    tmp_path: Path, folder: str
) -> None:
    path = gemma_scope(tmp_path / folder)
    with pytest.raises(ValueError, match="expected a layer, found none; name the site"):
        inspect_module("m", str(path))
    module = inspect_module("m", str(path), sites=["post_block.4"])
    assert module.sites[0].name == "post_block.4"
    assert torch.equal(loaded(module).b_dec, b_dec)


def test_a_site_that_contradicts_the_path_is_refused(tmp_path: Path) -> None:
    path = gemma_scope(tmp_path / "gemma-scope-2b-pt-res/layer_20/width_16k/l0_71")
    inspect_module("m", str(path), sites=["resid_post.20"])
    message = "the files say post_block.20, but sites names post_block.4"
    with pytest.raises(ValueError, match=message):
        inspect_module("m", str(path), sites=["post_block.4"])


def gemma_scope_2(path: Path, **config: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    tensors = {
        "w_enc": W_enc.T.contiguous(),
        "w_dec": W_dec,
        "b_enc": b_enc,
        "b_dec": b_dec,
        "threshold": threshold,
    }
    save_file(tensors, path / "params.safetensors")
    base = {
        "architecture": "jump_relu",
        "model_name": "gemma-v3-1b-pt",
        "hf_hook_point_in": "model.layers.9.output",
    }
    write_json(path / "config.json", {**base, **config})
    return path


def test_gemma_scope_2_is_jumprelu_with_lower_case_names(tmp_path: Path) -> None:
    path = gemma_scope_2(tmp_path)
    p = pre_activations(subtract=False)
    close(reconstruct(path), decode(p.relu() * (p > threshold.double())))
    assert inspect_module("m", str(path)).sites[0].name == "post_block.9"


def test_gemma_scope_2_without_a_configuration_has_its_layer_in_the_path(
    tmp_path: Path,
) -> None:
    path = gemma_scope_2(tmp_path / "resid_post/layer_17_width_16k_l0_small")
    (path / "config.json").unlink()
    assert inspect_module("m", str(path)).sites[0].name == "post_block.17"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hf_hook_point_in": "model.layers.9.self_attn.q_proj"}, "a point of a layer"),
        (
            {"hf_hook_point_out": "model.layers.10.output"},
            "expected an SAE, or a trans",
        ),
        ({"affine_connection": True}, "affine_connection: expected False, since"),
        ({"architecture": "topk"}, "architecture: expected jump_relu"),
    ],
)
def test_gemma_scope_2_refuses_other_kinds(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        inspect_module("m", str(gemma_scope_2(tmp_path, **config)))


# Llama Scope


def llama_scope(path: Path, **config: Any) -> Path:
    save_llama_scope(path, W_enc, b_enc, W_dec, b_dec, **{"top_k": K, **config})
    return path


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("function", ["jumprelu", "relu", "topk"])
def test_llama_scope_folds_out_both_activation_scales(
    tmp_path: Path, subtract: bool, function: str
) -> None:
    path = llama_scope(
        tmp_path,
        act_fn=function,
        apply_decoder_bias_to_pre_encoder=subtract,
        dataset_average_activation_norm={"in": 3.0, "out": 3.0},
    )
    # The SAE as trained sees s x and returns s x'. Its threshold is stated in units of
    # x, for pre-activations times the norms of the decoder rows.
    s = D**0.5 / 3.0
    norms = W_dec.double().norm(dim=1)
    x = inputs() * s - b_dec.double() * subtract
    p = x @ W_enc.double().T + b_enc.double()
    mask = {
        "jumprelu": p / s * norms > 0.6,
        "relu": p > 0,
        "topk": topk_mask(p * norms, K) & (p > 0),
    }[function]
    close(reconstruct(path), decode(p * mask) / s)


def test_llama_scope_scales_input_and_output_apart(tmp_path: Path) -> None:
    s_in, s_out = D**0.5 / 3.0, D**0.5 / 2.0
    p = (inputs() * s_in) @ W_enc.double().T + b_enc.double()
    norms = W_dec.double().norm(dim=1) * s_in / s_out
    f = p * (p / s_in * norms > 0.6)
    close(reconstruct(llama_scope(tmp_path)), decode(f) / s_out)


def test_llama_scope_subtracts_no_bias_of_another_scale(tmp_path: Path) -> None:
    path = llama_scope(tmp_path, apply_decoder_bias_to_pre_encoder=True)
    with pytest.raises(ValueError, match="to_pre_encoder: expected false, since input"):
        inspect_module("m", str(path))


@pytest.mark.parametrize("before", [True, False])
def test_a_llama_scope_transcoder_reads_what_the_mlp_reads_and_writes_its_output(
    tmp_path: Path, before: bool
) -> None:
    hook_in = "ln2.hook_normalized" if before else "mlp.hook_in"
    path = llama_scope(
        tmp_path,
        hook_point_in=f"blocks.12.{hook_in}",
        hook_point_out="blocks.12.hook_mlp_out",
    )
    site = inspect_module("m", str(path)).sites[0]
    assert (site.name, site.hook_out, site.before_gain) == (
        "mlp_in.12",
        HookPoint.MLP_OUT,
        before,
    )
    s_in, s_out = D**0.5 / 3.0, D**0.5 / 2.0
    p = (inputs() * s_in) @ W_enc.double().T + b_enc.double()
    f = p * (p / s_in * W_dec.double().norm(dim=1) * s_in / s_out > 0.6)
    close(reconstruct(path), decode(f) / s_out)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_glu_encoder": True}, "use_glu_encoder: expected false"),
        ({"norm_activation": "token-wise"}, "norm_activation: expected dataset-wise"),
        ({"hook_point_out": "blocks.12.hook_mlp_out"}, "expected an SAE, or a tr"),
        ({"dataset_average_activation_norm": {"in": 0}}, "in: expected a finite pos"),
        ({"jump_relu_threshold": None}, "jump_relu_threshold: expected a finite"),
        ({"act_fn": "gelu"}, "act_fn: expected relu, jumprelu or topk"),
    ],
)
def test_llama_scope_refuses_what_does_not_fold(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        inspect_module("m", str(llama_scope(tmp_path, **config)))


# EleutherAI sparsify


def sparsify(path: Path, **cfg: Any) -> Path:
    write_json(path / "cfg.json", {"d_in": D, "expansion_factor": 3, "k": K, **cfg})
    tensors = {
        "encoder.weight": W_enc,
        "encoder.bias": b_enc,
        "W_dec": W_dec,
        "b_dec": b_dec,
    }
    save_file(tensors, path / "sae.safetensors")
    return path


def test_sparsify_selects_the_k_largest_after_relu(tmp_path: Path) -> None:
    path = sparsify(tmp_path / "layers.6")
    p = pre_activations(subtract=True).relu()
    close(reconstruct(path), decode(p * topk_mask(p, K)))
    assert inspect_module("m", str(path)).sites[0].name == "post_block.6"


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"transcode": True}, "layers.N.mlp: expected a layer, found none"),
        ({"skip_connection": True}, "skip_connection: expected what sae.safetensors"),
        ({"signed": True}, "signed: expected false"),
        ({"activation": "groupmax"}, "activation: expected topk"),
        ({"k": F + 1}, "k: expected at most"),
    ],
)
def test_sparsify_refuses_what_does_not_fold(
    tmp_path: Path, cfg: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        inspect_module("m", str(sparsify(tmp_path / "layers.6", **cfg)))


# Bare torch files


def qwen_scope(path: Path, layers: tuple[int, ...]) -> Path:
    path.mkdir(parents=True)
    state = {"W_enc": W_enc, "W_dec": W_dec.T, "b_enc": b_enc, "b_dec": b_dec}
    for layer in layers:
        torch.save(state, path / f"layer{layer}.sae.pt")
    return path


def test_qwen_scope_selects_the_k_of_its_name(tmp_path: Path) -> None:
    root = qwen_scope(tmp_path / f"SAE-Res-Qwen3-1.7B-Base-W32K-L0_{K}", (5,))
    p = pre_activations(subtract=False)
    close(reconstruct(root / "layer5.sae.pt"), decode((p * topk_mask(p, K)).relu()))


def test_a_qwen_scope_repository_has_one_site_per_file(tmp_path: Path) -> None:
    root = qwen_scope(tmp_path / f"SAE-Res-Qwen3-8B-Base-W64K-L0_{K}", (10, 2))
    module = inspect_module("m", str(root))
    assert [site.name for site in module.sites] == ["post_block.2", "post_block.10"]
    chosen = inspect_module("m", str(root), sites=["post_block.10"])
    weights = new_weights(chosen.sites[0])
    load_site(chosen, chosen.sites[0], weights)
    p = pre_activations(subtract=False)
    close(
        canonical(weights, chosen.sites[0], inputs()),
        decode((p * topk_mask(p, K)).relu()),
    )


def test_qwen_scope_without_its_name_has_no_k(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="k in it, such as ...-L0_50, found none"):
        inspect_module("m", str(qwen_scope(tmp_path / "qwen", (5,))))


@pytest.mark.parametrize(
    ("encoder", "decoder"),
    [("encoder_linear", "decoder_linear"), ("encoder", "decoder")],
)
def test_goodfire_is_relu_without_an_input_bias(
    tmp_path: Path, encoder: str, decoder: str
) -> None:
    state = {
        f"{encoder}.weight": W_enc,
        f"{encoder}.bias": b_enc,
        f"{decoder}.weight": W_dec.T.contiguous(),
        f"{decoder}.bias": b_dec,
    }
    path = tmp_path / "Llama-3.1-8B-Instruct-SAE-l19.pth"
    torch.save(state, path)
    close(reconstruct(path), decode(pre_activations(subtract=False).relu()))
    (site,) = inspect_module("m", str(tmp_path)).sites
    assert (site.name, site.activation) == ("post_block.19", Activation.RELU)
