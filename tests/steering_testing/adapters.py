# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters of the tiny models."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from steering_testing import models

RANK = 4
TARGETS = ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj")


def save_adapter(path: Path) -> Any:
    """A random adapter as PEFT saves it, and the model that it makes."""
    model = copy.deepcopy(models.build("llama"))
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    with torch.no_grad():
        for name, module in model.named_modules():
            if not name.endswith(TARGETS):
                continue
            out_size, in_size = module.weight.shape
            A = torch.randn(RANK, in_size, generator=generator) * 0.1
            B = torch.randn(out_size, RANK, generator=generator) * 0.1
            module.weight += 2.0 * B @ A
            tensors[f"base_model.model.{name}.lora_A.weight"] = A
            tensors[f"base_model.model.{name}.lora_B.weight"] = B
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": list(TARGETS),
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    (path / "adapter_config.json").write_text(json.dumps(config))
    return model
