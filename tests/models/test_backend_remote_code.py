# SPDX-License-Identifier: Apache-2.0
"""A model whose code comes with its checkpoint, under the Transformers backend."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from steering_testing import models, oracle
from steering_testing.cases import CASES
from steering_testing.conformance import requests, site_modules
from steering_testing.engine import assert_same, engine_on, generate, params
from steering_testing.requests import prompt, specs

pytestmark = pytest.mark.engine

# Its layer has the parts of Llama's and scales what attention writes by FACTOR.
CODE = """
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

class NewConfig(LlamaConfig):
    model_type = "new"

class NewDecoderLayer(LlamaDecoderLayer):
    def forward(self, hidden_states, position_embeddings=None, **kwargs):
        residual = hidden_states
        attended, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states),
            position_embeddings=position_embeddings, **kwargs)
        hidden_states = residual + attended * FACTOR
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))

class NewModel(LlamaModel):
    config_class = NewConfig
    def __init__(self, config):
        super().__init__(config)
        for at in range(config.num_hidden_layers):
            self.layers[at] = NewDecoderLayer(config, at)
        self.post_init()

class NewForCausalLM(LlamaForCausalLM):
    config_class = NewConfig
    def __init__(self, config):
        super().__init__(config)
        self.model = NewModel(config)
        self.post_init()
"""


@pytest.fixture(scope="module", autouse=True)
def code_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the checkpoints' code out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("code"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", folder)
        patch.setattr(sys, "path", [*sys.path])
        yield


def save(path: Path, factor: float) -> Path:
    """A checkpoint of the tiny Llama's weights with code of its own."""
    models.build("llama").save_pretrained(path)
    (path / "modeling_new.py").write_text(CODE.replace("FACTOR", str(factor)))
    config = json.loads((path / "config.json").read_text())
    config |= {
        "model_type": "new",
        "architectures": ["NewForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_new.NewConfig",
            "AutoModel": "modeling_new.NewModel",
            "AutoModelForCausalLM": "modeling_new.NewForCausalLM",
        },
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


def run(path: Path, tmp_path: Path, decoder_layer: str) -> None:
    """Steer every point of the model; the answers are those of the tiny Llama."""
    case = CASES["llama"]
    modules = site_modules(case)
    asked = requests(case, modules)
    prompts = [prompt(at, 4 + at % 5) for at in range(len(asked))]
    sampling = [params(4, **specs(*asks)) for asks in asked]
    paths = modules.save(tmp_path / "modules")
    options: dict[str, Any] = {"trust_remote_code": True}
    steering = {"decoder_layer": decoder_layer}
    with engine_on(path, paths, steering, **options) as llm:
        found = generate(llm, prompts, sampling)
    for ids, asks, result in zip(prompts, asked, found, strict=True):
        edits = modules.edits(*asks)
        expected = oracle.follow(models.build("llama"), ids, edits, result.tokens)
        assert_same(result, expected, f"{asks}")


def test_the_error_names_the_layer_and_says_what_can_be_tried(tmp_path: Path) -> None:
    path = save(tmp_path / "model_known", 1.0)
    with pytest.raises(ValueError) as refusal:
        run(path, tmp_path, "known")
    message = str(refusal.value)
    assert "NewDecoderLayer whose code may do something else" in message
    assert "vLLM's Transformers backend" in message
    assert "docs/features/models.md" in message
    assert "--steering-decoder-layer auto" in message


@pytest.mark.slow
def test_auto_steers_code_that_does_what_its_names_say(tmp_path: Path) -> None:
    run(save(tmp_path / "model_same", 1.0), tmp_path, "auto")


@pytest.mark.slow
def test_auto_refuses_code_that_does_something_else(tmp_path: Path) -> None:
    path = save(tmp_path / "model_scaled", 0.5)
    with pytest.raises(ValueError, match="not the one it was given plus what atten"):
        run(path, tmp_path, "auto")
