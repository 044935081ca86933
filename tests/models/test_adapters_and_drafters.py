# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters and drafters: a request is steered as it runs, and drafts are not."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from steering_testing import models, oracle
from steering_testing.adapters import save_adapter
from steering_testing.cases import CASES
from steering_testing.conformance import requests, site_modules
from steering_testing.engine import (
    answer_of,
    assert_same,
    engine,
    generate,
    params,
    runner,
)
from steering_testing.requests import prompt, specs

from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.steering_attach import (
    SteeredLayer,
    SteeredNorm,
    SteeredSublayer,
)

pytestmark = pytest.mark.engine

CASE = CASES["llama"]
STEERED = (SteeredLayer, SteeredNorm, SteeredSublayer)


@pytest.mark.parametrize(
    "model_impl", ["vllm", pytest.param("transformers", marks=pytest.mark.slow)]
)
def test_requests_of_an_adapter_and_of_the_model_are_steered_side_by_side(
    model_impl: str, model_root: Path, tmp_path: Path
) -> None:
    adapted = save_adapter(tmp_path / "adapter")
    lora = LoRARequest("a", 1, str(tmp_path / "adapter"))
    modules = site_modules(CASE)
    asked = [asks for asks in requests(CASE, modules) for _ in range(2)]
    prompts = [prompt(at // 2, 4 + at // 2 % 5) for at in range(len(asked))]
    loras = [lora if at % 2 else None for at in range(len(asked))]
    sampling = [params(3, **specs(*asks)) for asks in asked]
    paths = modules.save(tmp_path / "modules")
    # vLLM's CPU kernels take a request without an adapter for one of the last slot's,
    # which must be empty.
    options: dict[str, Any] = {
        "enable_lora": True,
        "max_lora_rank": 8,
        "max_loras": 2,
        "model_impl": model_impl,
    }
    with engine("llama", model_root, paths, **options) as llm:
        inputs = [{"prompt_token_ids": ids} for ids in prompts]
        outputs = llm.generate(inputs, sampling, use_tqdm=False, lora_request=loras)
    for at, output in enumerate(outputs):
        model = adapted if at % 2 else models.build("llama")
        found = answer_of(output)
        edits = modules.edits(*asked[at])
        expected = oracle.follow(model, prompts[at], edits, found.tokens)
        assert_same(found, expected, f"adapter {at % 2}: {asked[at]}")


def save_eagle(path: Path) -> None:
    """A random EAGLE head for the tiny Llama."""
    config = models.FAMILIES["llama"]()
    config.num_hidden_layers = 1
    one = type(models.build("llama"))(config)
    generator = torch.Generator().manual_seed(2)
    tensors = {
        name.removeprefix("model."): torch.randn(w.shape, generator=generator) * 0.08
        for name, w in one.named_parameters()
        if ".layers." in name and "input_layernorm" not in name
    }
    D = models.HIDDEN
    tensors["fc.weight"] = torch.randn(D, 2 * D, generator=generator) * 0.08
    config.save_pretrained(path)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((path / "config.json").read_text())
    values["architectures"] = ["EagleLlamaForCausalLM"]
    (path / "config.json").write_text(json.dumps(values))


def save_mtp(path: Path) -> None:
    """The tiny GLM-4.5 with a layer that predicts one token more."""
    models.build("glm4_moe").save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    last, extra = f"model.layers.{models.LAYERS - 1}.", f"model.layers.{models.LAYERS}."
    tensors |= {
        extra + name.removeprefix(last): value.clone()
        for name, value in tensors.items()
        if name.startswith(last)
    }
    D = models.HIDDEN
    generator = torch.Generator().manual_seed(3)
    tensors[f"{extra}eh_proj.weight"] = torch.randn(D, 2 * D, generator=generator) * 0.1
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        tensors[f"{extra}{norm}.weight"] = torch.ones(D)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((path / "config.json").read_text())
    values["num_nextn_predict_layers"] = 1
    (path / "config.json").write_text(json.dumps(values))


def speculation(method: str, root: Path) -> dict[str, Any]:
    """The drafter of a model that `root` holds."""
    found = {"method": method, "num_speculative_tokens": 1 if method == "mtp" else 2}
    if method == "mtp":
        save_mtp(root / "glm4_moe-0")  # where `engine` looks
        return found
    if method == "eagle":
        save_eagle(root / "eagle")
        return {**found, "model": str(root / "eagle")}
    # The model itself: without steering, all that it drafts would be accepted.
    return {**found, "model": str(models.save("llama", root))}


@pytest.mark.parametrize(
    "method",
    [
        "draft_model",
        pytest.param("eagle", marks=pytest.mark.slow),
        pytest.param("mtp", marks=pytest.mark.slow),
    ],
)
def test_what_a_drafter_proposes_is_steered_and_the_drafter_is_not(
    method: str, tmp_path: Path
) -> None:
    family = "glm4_moe" if method == "mtp" else "llama"
    case = dataclasses.replace(CASES[family], lacks=("attn_out", "mlp_in"))
    modules = site_modules(case)
    asked = requests(case, modules)
    prompts = [prompt(at, 4 + at % 5) for at in range(len(asked))]
    sampling = [params(6, **specs(*asks)) for asks in asked]
    drafter = speculation(method, tmp_path)
    paths = modules.save(tmp_path / "modules")
    with engine(family, tmp_path, paths, speculative_config=drafter) as llm:
        found = generate(llm, prompts, sampling)
        steered = [
            {type(module) for module in model.modules() if isinstance(module, STEERED)}
            for model in (runner(llm).get_model(), runner(llm).drafter.model)
        ]
        runner(llm).steering.check_integrity()
    assert steered[0] and not steered[1]
    for ids, asks, result in zip(prompts, asked, found, strict=True):
        edits = modules.edits(*asks)
        expected = oracle.follow(models.build(family), ids, edits, result.tokens)
        assert_same(result, expected, f"{method}: {asks}")
