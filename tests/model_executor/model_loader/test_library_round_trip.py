# SPDX-License-Identifier: Apache-2.0
"""What llamascopium and dictionary_learning save reconstructs as they do.

`make test-sae-lens` runs it; without the packages its tests skip.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from sae_reference import D, F, K, inputs, reconstruct, write_json

from vllm.config.steering_points import HookPoint
from vllm.model_executor.model_loader.sae_loader import inspect_module

STREAM = "blocks.5.hook_resid_post"
MLP_IN, MLP_OUT = "blocks.5.ln2.hook_normalized", "blocks.5.hook_mlp_out"


def randomise(sae: torch.nn.Module) -> None:
    """Normal numbers, and decoder rows of norms far from one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(sae.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator) * 0.4
            if name in ("W_D", "W_dec"):
                noise *= torch.linspace(0.3, 2, len(noise))[:, None]
            if name == "decoder.weight":
                noise *= torch.linspace(0.3, 2, noise.shape[1])
            parameter.copy_(noise)


def agrees(path: Path, expected: torch.Tensor) -> None:
    assert expected.std() > 0.01
    error = (reconstruct(path) - expected).abs().max() / expected.abs().max()
    assert float(error) < 1e-6


# llamascopium


@pytest.fixture(scope="module")
def llamascopium() -> ModuleType:
    return pytest.importorskip(
        "llamascopium.models.sae", reason="needs the llamascopium package"
    )


def by_llamascopium(sae: Any) -> torch.Tensor:
    """The library's own reconstruction of `inputs()`, in float64."""
    twin = type(sae)(sae.cfg.model_copy(update={"dtype": torch.float64}))
    twin.load_state_dict({k: v.double() for k, v in sae.state_dict().items()})
    twin.set_dataset_average_activation_norm(sae.dataset_average_activation_norm)
    hook_in, hook_out = sae.cfg.hook_point_in, sae.cfg.hook_point_out
    batch = {hook_in: inputs(), hook_out: inputs()}
    with torch.no_grad():
        scaled, factors = twin.normalize_activations(batch, return_scale_factor=True)
        return twin.decode(twin.encode(scaled[hook_in])) / factors[hook_out]


def new_llamascopium(library: ModuleType, **options: Any) -> Any:
    base = {
        "hook_point_in": STREAM,
        "hook_point_out": STREAM,
        "d_model": D,
        "expansion_factor": F / D,
        "top_k": K,
    }
    sae = library.SparseAutoEncoder(library.SAEConfig(**{**base, **options}))
    randomise(sae)
    hooks = (sae.cfg.hook_point_in, sae.cfg.hook_point_out)
    sae.set_dataset_average_activation_norm(dict(zip(hooks, (3.0, 2.0), strict=True)))
    return sae


@pytest.mark.parametrize("function", ["relu", "jumprelu", "topk"])
@pytest.mark.parametrize("by_norm", [False, True])
@pytest.mark.parametrize("folded", [False, True])
def test_a_llamascopium_sae_reconstructs_the_same(
    tmp_path: Path,
    llamascopium: ModuleType,
    function: str,
    by_norm: bool,
    folded: bool,
) -> None:
    options = {"act_fn": function, "sparsity_include_decoder_norm": by_norm}
    sae = new_llamascopium(llamascopium, **options, use_decoder_bias=not folded)
    sae.save_pretrained(tmp_path, fold_activation_scale=folded)
    sae.cfg.save_hyperparameters(tmp_path)
    agrees(tmp_path, by_llamascopium(sae))


@pytest.mark.parametrize("function", ["relu", "jumprelu", "topk"])
def test_a_llamascopium_transcoder_reconstructs_the_same(
    tmp_path: Path, llamascopium: ModuleType, function: str
) -> None:
    hooks = {"hook_point_in": MLP_IN, "hook_point_out": MLP_OUT}
    sae = new_llamascopium(llamascopium, act_fn=function, **hooks)
    sae.save_pretrained(tmp_path)
    sae.cfg.save_hyperparameters(tmp_path)
    agrees(tmp_path, by_llamascopium(sae))
    (site,) = inspect_module("m", str(tmp_path)).sites
    assert (site.name, site.out_hook, site.before_gain) == (
        "mlp_in.5",
        HookPoint.MLP_OUT,
        True,
    )


# dictionary_learning


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The package's trainers. Its buffers, which need nnsight, are not used here."""
    if "nnsight" not in sys.modules:
        nnsight = ModuleType("nnsight")
        monkeypatch.setattr(nnsight, "LanguageModel", object, raising=False)
        monkeypatch.setitem(sys.modules, "nnsight", nnsight)
    reason = "needs the dictionary-learning package"
    pytest.importorskip("dictionary_learning.dictionary", reason=reason)
    return importlib.import_module("dictionary_learning.trainers")


@pytest.mark.parametrize(
    ("file", "name", "options"),
    [
        ("standard", "StandardTrainer", {}),
        ("standard", "StandardTrainerAprilUpdate", {}),
        ("p_anneal", "PAnnealTrainer", {}),
        ("gdm", "GatedSAETrainer", {}),
        ("gated_anneal", "GatedAnnealTrainer", {}),
        ("top_k", "TopKTrainer", {"k": K}),
        ("batch_top_k", "BatchTopKTrainer", {"k": K}),
        ("jumprelu", "JumpReluTrainer", {}),
        (
            "matryoshka_batch_top_k",
            "MatryoshkaBatchTopKTrainer",
            {"k": K, "group_fractions": [0.25, 0.75]},
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_dictionary_learning_trainer_makes_reconstructs_the_same(
    tmp_path: Path, trainers: ModuleType, file: str, name: str, options: dict[str, Any]
) -> None:
    module = importlib.import_module(f"{trainers.__name__}.{file}")
    sizes = {"activation_dim": D, "dict_size": F, "layer": 5, "lm_name": "x/y"}
    trainer = getattr(module, name)(steps=50_000, device="cpu", **sizes, **options)
    sae = trainer.ae
    randomise(sae)
    if "TopK" in name:
        sae.threshold.fill_(0.6)
    sae.scale_biases(1.5)
    config = json.loads(json.dumps({"trainer": trainer.config}))
    write_json(tmp_path / "config.json", config)
    torch.save(sae.state_dict(), tmp_path / "ae.pt")
    with torch.no_grad():
        agrees(tmp_path, sae.double()(inputs()))
    assert inspect_module("m", str(tmp_path)).sites[0].name == "post_block.5"
