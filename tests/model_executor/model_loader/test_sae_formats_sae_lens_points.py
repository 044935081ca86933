# SPDX-License-Identifier: Apache-2.0
"""SAELens: transcoders, SAEs on sublayers, and what only its release list says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from example_weights import (
    D_OUT,
    SAE,
    TRANSCODER,
    W_enc,
    W_skip,
    b_dec,
    decode,
    is_transcoder,
    jump,
    pre,
    site_of,
    threshold,
    transcode,
)
from sae_reference import (
    D,
    F,
    close,
    inputs,
    reconstruct,
    write_json,
)
from safetensors.torch import save_file

from vllm.model_executor.model_loader.sae_loader import inspect_module


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


@pytest.mark.parametrize(
    ("hook", "name", "raw"),
    [
        ("hook_mlp_out", "mlp_out.7", False),
        ("mlp.hook_out", "mlp_out.7", True),
        ("hook_attn_out", "attn_out.7", False),
        ("attn.hook_out", "attn_out.7", True),
        ("hook_out", "post_block.7", False),
    ],
)
def test_an_output_of_the_module_itself_is_before_a_norm_behind_it(
    tmp_path: Path, hook: str, name: str, raw: bool
) -> None:
    path = sae_lens(tmp_path, SAE, metadata={"hook_name": f"blocks.7.{hook}"})
    assert (site_of(path).name, site_of(path).raw_output) == (name, raw)


def test_a_sae_lens_transcoder_may_write_the_output_of_the_mlp_itself(
    tmp_path: Path,
) -> None:
    points = {
        "hook_name": "blocks.7.mlp.hook_in",
        "hook_name_out": "blocks.7.mlp.hook_out",
    }
    cfg = {"architecture": "transcoder", "metadata": points}
    site = site_of(sae_lens(tmp_path, TRANSCODER, **cfg))
    assert is_transcoder(site, 7, False) and site.raw_output


@pytest.mark.parametrize("hook", ["attn.hook_z", "hook_attn_out"])
@pytest.mark.parametrize("folded", [True, False])
def test_only_z_lacks_a_value_bias_that_was_folded(
    hook: str, folded: bool, tmp_path: Path
) -> None:
    weights = {"fold_value_biases": folded}
    point = {"hook_name": f"blocks.3.{hook}", "model_from_pretrained_kwargs": weights}
    path = sae_lens(tmp_path, SAE, architecture="standard", metadata=point)
    assert site_of(path).before_value_bias == (folded and hook == "attn.hook_z")


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
