# SPDX-License-Identifier: Apache-2.0
"""A tiny model and a tiny SAE, as files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.steering_testing import models

D_SAE = 32


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of `models.LAYERS` layers; bos 1, eos 2, pad 0."""
    return models.save("llama", tmp_path_factory.mktemp("models"))


def write_sae(
    path: Path,
    layer: int = 1,
    d_model: int = models.HIDDEN,
    hook: str = "hook_resid_post",
) -> Path:
    """A random ReLU SAE in SAELens form, at `blocks.{layer}.{hook}`."""
    path.mkdir(parents=True)
    generator = torch.Generator().manual_seed(layer)
    save_file(
        {
            "W_enc": torch.randn(d_model, D_SAE, generator=generator),
            "W_dec": torch.randn(D_SAE, d_model, generator=generator),
            "b_enc": torch.zeros(D_SAE),
            "b_dec": torch.zeros(d_model),
        },
        path / "sae_weights.safetensors",
    )
    config = {
        "architecture": "standard",
        "d_in": d_model,
        "d_sae": D_SAE,
        "dtype": "float32",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "metadata": {"hook_name": f"blocks.{layer}.{hook}"},
    }
    (path / "cfg.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="session")
def sae_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SAE that fits the model."""
    return write_sae(tmp_path_factory.mktemp("saes") / "sae")
