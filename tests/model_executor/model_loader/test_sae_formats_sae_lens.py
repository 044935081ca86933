# SPDX-License-Identifier: Apache-2.0
"""SAELens directories, each architecture against its own mathematics in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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

from vllm.config.steering import Activation
from vllm.config.steering_points import HookPoint
from vllm.model_executor.model_loader.sae_loader import inspect_module

WEIGHTS = "sae_weights.safetensors"


def base_tensors() -> dict[str, torch.Tensor]:
    return {
        "W_enc": tensor(D, F, seed=0),
        "b_enc": tensor(F, seed=1),
        "W_dec": tensor(F, D, seed=2),
        "b_dec": tensor(D, seed=3),
    }


def save(
    path: Path, tensors: dict[str, torch.Tensor], architecture: str, **cfg: Any
) -> Path:
    path.mkdir(exist_ok=True)
    save_file(tensors, path / WEIGHTS)
    metadata = {"hook_name": "blocks.5.hook_resid_post", "model_name": "tiny"}
    base = {"architecture": architecture, "d_in": D, "d_sae": F, "dtype": "float32"}
    write_json(path / "cfg.json", {**base, "metadata": metadata, **cfg})
    return path


def doubles(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.double() for name, value in tensors.items()}


@pytest.mark.parametrize("subtract", [True, False])
def test_standard_is_relu_of_the_encoder(tmp_path: Path, subtract: bool) -> None:
    tensors = base_tensors()
    save(tmp_path, tensors, "standard", apply_b_dec_to_input=subtract)
    t = doubles(tensors)
    x_in = inputs() - t["b_dec"] * subtract
    f = (x_in @ t["W_enc"] + t["b_enc"]).relu()
    close(reconstruct(tmp_path), f @ t["W_dec"] + t["b_dec"])


def test_the_input_bias_is_subtracted_when_the_configuration_does_not_say(
    tmp_path: Path,
) -> None:
    tensors = base_tensors()
    save(tmp_path, tensors, "standard")
    t = doubles(tensors)
    f = ((inputs() - t["b_dec"]) @ t["W_enc"] + t["b_enc"]).relu()
    close(reconstruct(tmp_path), f @ t["W_dec"] + t["b_dec"])


@pytest.mark.parametrize("subtract", [True, False])
def test_jumprelu_keeps_what_exceeds_its_threshold(
    tmp_path: Path, subtract: bool
) -> None:
    tensors = {**base_tensors(), "threshold": tensor(F, seed=4)}
    save(tmp_path, tensors, "jumprelu", apply_b_dec_to_input=subtract)
    t = doubles(tensors)
    p = (inputs() - t["b_dec"] * subtract) @ t["W_enc"] + t["b_enc"]
    f = p.relu() * (p > t["threshold"])
    close(reconstruct(tmp_path), f @ t["W_dec"] + t["b_dec"])


def test_topk_clips_the_selected_at_zero(tmp_path: Path) -> None:
    tensors = base_tensors()
    tensors["b_enc"] -= 1.5
    save(tmp_path, tensors, "topk", k=K)
    t = doubles(tensors)
    p = (inputs() - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    f = (p * topk_mask(p, K)).relu()
    close(reconstruct(tmp_path), f @ t["W_dec"] + t["b_dec"])


def test_topk_that_rescales_by_decoder_norm_selects_by_the_product(
    tmp_path: Path,
) -> None:
    tensors = base_tensors()
    tensors["W_dec"] *= torch.linspace(0.2, 3, F)[:, None]
    save(tmp_path, tensors, "topk", k=K, rescale_acts_by_decoder_norm=True)
    t = doubles(tensors)
    norms = t["W_dec"].norm(dim=1)
    p = ((inputs() - t["b_dec"]) @ t["W_enc"] + t["b_enc"]) * norms
    f = (p * topk_mask(p, K)).relu() / norms
    close(reconstruct(tmp_path), f @ t["W_dec"] + t["b_dec"])


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk"])
@pytest.mark.parametrize("rescale", [True, False])
def test_a_batchtopk_training_checkpoint_is_jumprelu_with_one_threshold(
    tmp_path: Path, architecture: str, rescale: bool
) -> None:
    threshold = torch.tensor(0.7, dtype=torch.float64)
    tensors = {**base_tensors(), "topk_threshold": threshold}
    tensors["W_dec"] *= torch.linspace(0.2, 3, F)[:, None]
    save(tmp_path, tensors, architecture, k=K, rescale_acts_by_decoder_norm=rescale)
    t = doubles(tensors)
    norms = t["W_dec"].norm(dim=1) if rescale else torch.ones(F).double()
    p = ((inputs() - t["b_dec"]) @ t["W_enc"] + t["b_enc"]) * norms
    f = p * (p > 0.7) / norms
    close(reconstruct(tmp_path), f @ t["W_dec"] + t["b_dec"])


@pytest.mark.parametrize("subtract", [True, False])
def test_gated_multiplies_gate_and_magnitude(tmp_path: Path, subtract: bool) -> None:
    tensors = base_tensors()
    del tensors["b_enc"]
    tensors |= {
        "r_mag": tensor(F, seed=5),
        "b_mag": tensor(F, seed=6),
        "b_gate": tensor(F, seed=7),
    }
    save(tmp_path, tensors, "gated", apply_b_dec_to_input=subtract)
    t = doubles(tensors)
    u = (inputs() - t["b_dec"] * subtract) @ t["W_enc"]
    gate = u + t["b_gate"] > 0
    f = gate * (u * t["r_mag"].exp() + t["b_mag"]).relu()
    close(reconstruct(tmp_path), f @ t["W_dec"] + t["b_dec"])


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "gated", "topk"])
@pytest.mark.parametrize("subtract", [True, False])
def test_an_input_scale_is_folded_out_on_both_sides(
    tmp_path: Path, architecture: str, subtract: bool
) -> None:
    scale = 2.5
    tensors = base_tensors()
    every = tensors | {
        "threshold": tensor(F, seed=4).abs(),
        "r_mag": tensor(F, seed=5),
        "b_mag": tensor(F, seed=6),
        "b_gate": tensor(F, seed=7),
    }
    own = {"jumprelu": ("threshold",), "gated": ("r_mag", "b_mag", "b_gate")}
    used = (*tensors, *own.get(architecture, ()))
    save(
        tmp_path,
        {name: every[name] for name in used},
        architecture,
        k=K,
        apply_b_dec_to_input=subtract,
        normalize_activations="expected_average_only_in",
        norm_scaling_factor=scale,
    )
    t = doubles(every)
    u = (inputs() * scale - t["b_dec"] * subtract) @ t["W_enc"]
    p = u + t["b_enc"]
    f = {
        "standard": p.relu(),
        "jumprelu": p * (p > t["threshold"]),
        "topk": (p * topk_mask(p, K)).relu(),
        "gated": (u + t["b_gate"] > 0) * (u * t["r_mag"].exp() + t["b_mag"]).relu(),
    }[architecture]
    close(reconstruct(tmp_path), (f @ t["W_dec"] + t["b_dec"]) / scale)


def test_the_input_scale_of_a_checkpoint_is_in_its_scaler_file(tmp_path: Path) -> None:
    tensors = base_tensors()
    save(
        tmp_path, tensors, "standard", normalize_activations="expected_average_only_in"
    )
    write_json(tmp_path / "activation_scaler.json", {"scaling_factor": 0.5})
    t = doubles(tensors)
    f = ((inputs() * 0.5 - t["b_dec"]) @ t["W_enc"] + t["b_enc"]).relu()
    close(reconstruct(tmp_path), (f @ t["W_dec"] + t["b_dec"]) / 0.5)


def test_an_input_scale_that_no_file_states_is_refused(tmp_path: Path) -> None:
    save(
        tmp_path,
        base_tensors(),
        "standard",
        normalize_activations="expected_average_only_in",
    )
    with pytest.raises(ValueError, match="norm_scaling_factor.*found neither"):
        inspect_module("m", str(tmp_path))


@pytest.mark.parametrize(
    ("name", "hook"),
    [
        ("resid_pre", HookPoint.PRE_ATTN),
        ("resid_mid", HookPoint.POST_ATTN),
        ("resid_post", HookPoint.POST_BLOCK),
    ],
)
def test_the_hook_name_gives_layer_and_hook(
    tmp_path: Path, name: str, hook: HookPoint
) -> None:
    metadata = {"hook_name": f"blocks.11.hook_{name}"}
    save(tmp_path, base_tensors(), "standard", metadata=metadata)
    (site,) = inspect_module("m", str(tmp_path)).sites
    assert (site.layer, site.hook, site.d_in, site.d_sae) == (11, hook, D, F)


def test_a_configuration_before_version_6_is_flat(tmp_path: Path) -> None:
    tensors = base_tensors()
    tmp_path.mkdir(exist_ok=True)
    save_file(tensors, tmp_path / WEIGHTS)
    cfg = {
        "hook_point": "blocks.{layer}.hook_resid_pre",
        "hook_point_layer": 7,
        "hook_point_head_index": None,
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": K},
        "normalize_activations": False,
        "d_in": D,
        "d_sae": F,
    }
    write_json(tmp_path / "cfg.json", cfg)
    (site,) = inspect_module("m", str(tmp_path)).sites
    assert (site.name, site.activation, site.k) == ("pre_attn.7", Activation.TOPK, K)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"architecture": "temporal"}, "architecture: expected one that folds"),
        ({"architecture": "skip_transcoder"}, "hook_name_out: expected the point"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations: expected"),
        (
            {"normalize_activations": "constant_norm_rescale"},
            "normalize_activations: expected",
        ),
        ({"reshape_activations": "hook_z"}, "reshape_activations: expected none"),
        (
            {"metadata": {"hook_name": "blocks.3.hook_mlp_in"}},
            "is not supported: it is TransformerLens's name for the stream before",
        ),
        ({"d_out": 4}, "d_out: expected no such key"),
        ({"activation_fn": "tanh-relu"}, "activation_fn: expected relu or topk"),
        (
            {"metadata": {"hook_name": "blocks.3.attn.hook_q"}},
            "hook_name: expected a point of a layer",
        ),
        ({"d_in": D + 1}, f"d_in: expected {D}.*found {D + 1}"),
        ({"d_sae": True}, "d_sae: expected an integer >= 1, found True"),
        ({"architecture": "topk", "k": F + 1}, f"k: expected at most {F}"),
        ({"architecture": "topk"}, "k: expected an integer >= 1, found nothing"),
        ({"apply_b_dec_to_input": "no"}, "apply_b_dec_to_input: expected true or"),
    ],
)
def test_what_cannot_be_folded_is_refused_by_name(
    tmp_path: Path, cfg: dict[str, Any], message: str
) -> None:
    save(tmp_path, base_tensors(), **{"architecture": "standard", **cfg})
    with pytest.raises(ValueError, match=message):
        inspect_module("m", str(tmp_path))


def test_a_finetuning_scale_other_than_one_is_refused(tmp_path: Path) -> None:
    tensors = {**base_tensors(), "scaling_factor": torch.ones(F)}
    save(tmp_path, tensors, "standard")
    assert inspect_module("m", str(tmp_path)).sites
    tensors["scaling_factor"][3] = 2
    save(tmp_path, tensors, "standard")
    with pytest.raises(ValueError, match="scaling_factor: expected all ones"):
        inspect_module("m", str(tmp_path))
