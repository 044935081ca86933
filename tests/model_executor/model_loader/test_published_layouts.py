# SPDX-License-Identifier: Apache-2.0
"""Tiny files in the layout of each of SAELens's loaders: same features, same output.

`make test-sae-lens` runs it; elsewhere it skips. Each case writes files as
the release has them, lets SAELens's own loader read them, and compares in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from make_saelens_table import read_list
from sae_reference import D, F, K, canonical, inputs, loaded, tensor, write_json
from safetensors.torch import save_file

from vllm.config.steering import SiteInfo
from vllm.model_executor.layers.steering_state import SAEWeights
from vllm.model_executor.model_loader.sae_loader import inspect_module

sae_lens = pytest.importorskip("sae_lens", reason="needs the sae-lens package")
from huggingface_hub.utils import EntryNotFoundError  # noqa: E402
from sae_lens.loading import pretrained_sae_loaders as loaders  # noqa: E402

Tensors = dict[str, torch.Tensor]
RELATIVE_ERROR = 1e-6
W_enc, b_enc = tensor(F, D, seed=10), tensor(F, seed=12)
# Rows of norm one: SAELens leaves the norms out where llamascopium counts them.
W_dec = torch.nn.functional.normalize(tensor(F, D, seed=11), dim=1)
b_dec, threshold = tensor(D, seed=13), tensor(F, seed=14).abs()
W_skip = tensor(D, D, seed=19)
SAE = {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec}
LINEAR = {
    "encoder.weight": W_enc,
    "encoder.bias": b_enc,
    "decoder.weight": W_dec.T.contiguous(),
}


@dataclass(frozen=True)
class Case:
    """One SAE as published: `write` makes its files below the repository's folder.

    `scale` is the factor of SAELens's list, `site` what our loader must find.
    """

    loader: str
    repo: str
    path: str
    write: Callable[[Path], None]
    site: str
    overrides: dict[str, Any] = field(default_factory=dict)
    scale: float | None = None
    options: dict[str, Any] = field(default_factory=dict)


def npz(b_dec: torch.Tensor = b_dec) -> Callable[[Path], None]:
    """Gemma Scope's `params.npz`."""

    def write(path: Path) -> None:
        arrays = {**SAE, "W_enc": W_enc.T, "b_dec": b_dec, "threshold": threshold}
        path.mkdir(parents=True)
        np.savez(path / "params.npz", **{k: v.numpy() for k, v in arrays.items()})

    return write


def gemma_3(skip: bool = False, **config: Any) -> Callable[[Path], None]:
    """Gemma Scope 2's `params.safetensors`, and `config.json` if it says anything."""

    def write(path: Path) -> None:
        stored = {name.lower(): value for name, value in SAE.items()}
        stored |= {"w_enc": W_enc.T.contiguous(), "threshold": threshold}
        if skip:
            stored["affine_skip_connection"] = W_skip.T.contiguous()
        path.mkdir(parents=True)
        save_file(stored, path / "params.safetensors")
        if config:
            write_json(path / "config.json", {"architecture": "jump_relu", **config})

    return write


def torch_file(state: Tensors, config: dict[str, Any] | None = None) -> Any:
    """A `.pt` file, with `NAME_cfg.json` beside it if there is a configuration."""

    def write(path: Path) -> None:
        path.parent.mkdir(parents=True)
        torch.save(state, path)
        if config is not None:
            write_json(path.with_name(f"{path.stem}_cfg.json"), config)

    return write


def dictionary(name: str, state: Tensors, **trainer: Any) -> Callable[[Path], None]:
    """dictionary_learning's `ae.pt` and `config.json`."""

    def write(path: Path) -> None:
        sizes = {"activation_dim": D, "dict_size": F, "layer": 5, "lm_name": "x/y"}
        config = {"dict_class": name, **sizes, **trainer}
        buffer = {"ctx_len": 8, "io": "out"}
        write_json(path / "config.json", {"trainer": config, "buffer": buffer})
        torch.save(state, path / "ae.pt")

    return write


def llama_scope(path: Path) -> None:
    norm = {"in": 0.7, "out": 0.7}
    hook = "blocks.4.hook_mlp_out"
    config = {
        "d_model": D,
        "d_sae": F,
        "hook_point_in": hook,
        "hook_point_out": hook,
        "jump_relu_threshold": 0.3,
        "dataset_average_activation_norm": norm,
        "sparsity_include_decoder_norm": False,
    }
    write_json(path / "hyperparams.json", config)
    (path / "checkpoints").mkdir()
    stored = {**LINEAR, "decoder.bias": b_dec}
    save_file(stored, path / "checkpoints/final.safetensors")


def llama_scope_r1(path: Path) -> None:
    hook = "blocks.0.hook_resid_post"
    config = {
        "d_model": D,
        "expansion_factor": F // D,
        "hook_point_in": hook,
        "hook_point_out": hook,
        "act_fn": "jumprelu",
        "norm_activation": "dataset-wise",
        "sparsity_include_decoder_norm": False,
    }
    write_json(path / "config.json", config)
    stored = {**LINEAR, "decoder.bias": b_dec, "log_jumprelu_threshold": threshold}
    save_file(stored, path / "sae_weights.safetensors")


def mwhanna(path: Path) -> None:
    path.parent.mkdir(parents=True)
    save_file(SAE, path)
    values = {"d_model": D, "d_feature": F, "batch_size": 8}
    wandb = {key: {"value": value} for key, value in values.items()}
    (path.parent / "wandb-config.yaml").write_text(yaml.safe_dump(wandb))
    config = {"model_name": "Qwen/Qwen3-4B", "feature_input_hook": "mlp.hook_in"}
    (path.parent / "config.yaml").write_text(yaml.safe_dump(config))


R1 = "800M-Slimpajama-0-OpenR1-Math-220k/L0R"
FEED_IN = "model.layers.5.pre_feedforward_layernorm.output"
FEED_OUT = "model.layers.5.post_feedforward_layernorm.output"
SKIP = {"hf_hook_point_in": FEED_IN, "hf_hook_point_out": FEED_OUT}
SKIP |= {"affine_connection": True, "model_name": "gemma-v3-1b-pt"}
PLAIN = {"W_enc": W_enc.T, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec}
GATE = {"r_mag": tensor(F, seed=15), "mag_bias": b_enc, "gate_bias": tensor(F, seed=17)}
CENTRED = {**LINEAR, "b_dec": b_dec}
POST = "post_block.5"
Z = {"act_name": "blocks.5.attn.hook_z", "act_size": D, "dict_size": F}
ANY_SITE = {"sites": ["pre_attn.3"]}
HEADLESS = {k: v for k, v in LINEAR.items() if k != "encoder.bias"}

CASES = [
    Case("gemma_2", "google/gemma-scope-2b-pt-res", "layer_5/a", npz(), POST),
    Case("gemma_2", "google/gemma-scope-2b-pt-mlp", "layer_5/a", npz(), "mlp_out.5"),
    Case("gemma_2", "google/gemma-scope-2b-pt-att", "layer_5/a", npz(), "attn_z.5"),
    Case(
        "gemma_2_transcoder",
        "google/gemma-scope-2b-pt-transcoders",
        "layer_5/width_16k/a",
        npz(),
        "mlp_in.5",
    ),
    # SAELens does not scale b_dec with the embeddings.
    Case(
        "gemma_2",
        "google/gemma-scope-2b-pt-res",
        "embedding/width_4k/a",
        npz(torch.zeros(D)),
        "pre_attn.0",
    ),
    Case("gemma_3", "g/scope-2-1b", "resid_post/layer_5_a", gemma_3(), POST),
    Case("gemma_3", "g/scope-2-1b", "mlp_out_all/layer_5_a", gemma_3(), "mlp_out.5"),
    Case("gemma_3", "g/scope-2-1b", "attn_out/layer_5_a", gemma_3(), "attn_z.5"),
    Case("gemma_3", "g/scope-2-1b", "transcoder/layer_5_a", gemma_3(), "mlp_in.5"),
    Case(
        "gemma_3",
        "g/scope-2-1b",
        "transcoder/layer_5_affine",
        gemma_3(skip=True, **SKIP),
        "mlp_in.5",
    ),
    Case(
        "dictionary_learning_1",
        "canrager/lm_sae",
        "a/trainer_0",
        dictionary("AutoEncoder", {**LINEAR, "bias": b_dec}),
        POST,
    ),
    Case(
        "dictionary_learning_1",
        "canrager/lm_sae",
        "a/trainer_1",
        dictionary("AutoEncoderTopK", CENTRED, k=K),
        POST,
    ),
    Case(
        "dictionary_learning_1",
        "canrager/lm_sae",
        "a/trainer_2",
        dictionary("BatchTopKSAE", {**CENTRED, "threshold": torch.tensor(0.4)}),
        POST,
    ),
    Case(
        "dictionary_learning_1",
        "canrager/lm_sae",
        "a/trainer_3",
        dictionary("MatryoshkaBatchTopKSAE", {**PLAIN, "threshold": torch.tensor(0.4)}),
        POST,
    ),
    Case(
        "dictionary_learning_1",
        "canrager/lm_sae",
        "a/trainer_4",
        dictionary("JumpReluAutoEncoder", {**PLAIN, "threshold": threshold}),
        POST,
    ),
    Case(
        "dictionary_learning_1",
        "canrager/lm_sae",
        "a/trainer_5",
        dictionary("GatedAutoEncoder", {**HEADLESS, "decoder_bias": b_dec, **GATE}),
        POST,
    ),
    Case(
        "qwen_scope",
        f"Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_{K}",
        "layer5.sae.pt",
        torch_file({**SAE, "W_dec": W_dec.T.contiguous()}),
        POST,
    ),
    Case(
        "goodfire",
        "Goodfire/Llama-3.1-8B-Instruct-SAE-l19",
        "Llama-3.1-8B-Instruct-SAE-l19.pth",
        torch_file(
            {
                "encoder_linear.weight": W_enc,
                "encoder_linear.bias": b_enc,
                "decoder_linear.weight": W_dec.T.contiguous(),
                "decoder_linear.bias": b_dec,
            }
        ),
        "post_block.19",
    ),
    Case(
        "deepseek_r1",
        "qresearch/DeepSeek-R1-Distill-Llama-8B-SAE-l19",
        "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt",
        torch_file({**LINEAR, "decoder.bias": b_dec}),
        "post_block.19",
    ),
    Case(
        "connor_rob_hook_z",
        "ckkissane/attn-saes-gpt2-small-all-layers",
        "gpt2-small_L5_Hcat_z.pt",
        torch_file(PLAIN, Z),
        "attn_z.5",
    ),
    Case(
        "llama_scope",
        "fnlp/Llama3_1-8B-Base-LXM-8x",
        "Llama3_1-8B-Base-L4M-8x",
        llama_scope,
        "mlp_out.4",
        scale=D**0.5 / 0.7,
    ),
    Case(
        "llama_scope_r1_distill",
        "fnlp/Llama-Scope-R1-Distill",
        R1,
        llama_scope_r1,
        "post_block.0",
        scale=53.52995401997436,
    ),
    Case(
        "mwhanna_transcoder",
        "mwhanna/qwen3-4b-transcoders",
        "layer_5.safetensors",
        mwhanna,
        "mlp_in.5",
    ),
]


def read_by_sae_lens(case: Case, root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The SAE that SAELens makes of the files, in float64."""

    def download(repo_id: str, filename: str, **options: Any) -> str:
        path = root / (options.get("subfolder") or "") / filename
        if not path.exists():
            raise EntryNotFoundError("no such file")
        return str(path)

    def shapes(repo_id: str, filename: str) -> dict[str, list[int]]:
        return {name: list(value.shape) for name, value in stored.items()}

    stored = {"w_enc": W_enc.T, "w_dec": W_dec}
    monkeypatch.setattr(loaders, "hf_hub_download", download)
    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", shapes)
    # Some of its loaders know the published sizes only.
    sizes: dict[str, Any] = {"d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu"}
    if case.loader == "gemma_2_transcoder":
        sizes["d_out"] = D
    load = loaders.NAMED_PRETRAINED_SAE_LOADERS[case.loader]
    config, state, _ = load(case.repo, case.path, "cpu", False, sizes)
    config = loaders.handle_config_defaulting(config)
    config_class = sae_lens.SAE.get_sae_config_class_for_architecture(
        config["architecture"]
    )
    parsed = config_class.from_dict(config)
    sae = sae_lens.SAE.get_sae_class_for_architecture(parsed.architecture())(parsed)
    sae.process_state_dict_for_loading(state)
    sae.load_state_dict(state)
    if case.scale is not None:
        sae.fold_activation_norm_scaling_factor(case.scale)
    sae.turn_off_forward_pass_hook_z_reshaping()
    sae.dtype = torch.float64
    return sae.double()


def features(weights: SAEWeights, site: SiteInfo, x: torch.Tensor) -> torch.Tensor:
    """Feature activations times the norm of their decoder rows, float64 `[T, F]`."""
    # The decoder replaced by the identity gives the activations.
    plain = SAEWeights(F, D, torch.float32, torch.device("cpu"), d_out=F)
    for name in ("W_enc", "b_enc", "threshold"):
        getattr(plain, name).copy_(getattr(weights, name))
    plain.W_dec.copy_(torch.eye(F))
    return canonical(plain, site, x) * weights.W_dec.double().norm(dim=1)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert expected.abs().max() > 0.01
    return float((found - expected).abs().max() / expected.abs().max())


def test_every_loader_of_the_list_has_a_case_or_is_refused() -> None:
    listed = {
        release["conversion_func"] or "sae_lens" for release in read_list().values()
    }
    # test_sae_lens_round_trip.py has SAELens's own layout.
    elsewhere = {"sae_lens", "temporal", "mntss_clt_layer_transcoder"}
    assert listed == {case.loader for case in CASES} | elsewhere


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.loader}-{c.site}-{c.path}")
def test_a_published_layout_encodes_and_decodes_as_in_sae_lens(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / case.repo
    case.write(root / case.path)
    module = inspect_module("m", str(root / case.path), **case.options)
    (site,) = module.sites
    assert site.name == case.site
    weights = loaded(module)
    sae = read_by_sae_lens(case, root, monkeypatch)
    x = inputs()
    with torch.no_grad():
        acts = sae.encode(x)
        norms = sae.W_dec.norm(dim=1)
        expected = sae(x)
    assert (acts > 0).any() and (acts == 0).any()
    assert relative_error(features(weights, site, x), acts * norms) < RELATIVE_ERROR
    assert relative_error(canonical(weights, site, x), expected) < RELATIVE_ERROR
