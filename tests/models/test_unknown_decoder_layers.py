# SPDX-License-Identifier: Apache-2.0
"""Decoder-layer classes that the table lacks: refused, or recognised and checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from steering_testing import models
from steering_testing.cases import AUTO_CASES, CASES
from steering_testing.conformance import conforms, site_modules
from torch import nn

from vllm import LLM
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.model_executor.layers.steering_auto_family import (
    TOKENS,
    trust_unknown_layers,
)
from vllm.model_executor.layers.steering_families import (
    FAMILIES,
    find_decoder_layers,
    has_known_layers,
)
from vllm.utils.argparse_utils import FlexibleArgumentParser

D = 16


def start(path: Path, tmp_path: Path, **steering: Any) -> str:
    """Why an engine on a model does not start with steering."""
    module = site_modules(CASES["llama"]).save(tmp_path)["v-0-pre_attn"]
    with pytest.raises(ValueError) as refusal:
        LLM(
            str(path),
            skip_tokenizer_init=True,
            dtype="float32",
            kv_cache_memory_bytes=1 << 27,
            max_model_len=64,
            enforce_eager=True,
            additional_config={"steering": {"modules": {"v": module}, **steering}},
        )
    return str(refusal.value)


@pytest.fixture
def unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table without the classes on which `auto` is tested."""
    for case in (*AUTO_CASES.values(), CASES["granitemoe"]):
        monkeypatch.delitem(FAMILIES, case.layer_class)


@pytest.mark.engine
@pytest.mark.usefixtures("unknown")
def test_an_unknown_decoder_class_is_refused_at_start_up(
    model_root: Path, tmp_path: Path
) -> None:
    message = start(models.save("stablelm", model_root), tmp_path)
    assert "StablelmDecoderLayer" in message
    assert "To add one" in message and "--steering-decoder-layer auto" in message
    assert "steering_family_table.py" in message
    for known in FAMILIES:
        assert known in message


@pytest.mark.engine
@pytest.mark.usefixtures("unknown")
@pytest.mark.parametrize(
    "name", ["stablelm", pytest.param("nemotron", marks=pytest.mark.slow)]
)
def test_auto_steers_a_class_that_does_what_its_names_say(
    name: str, model_root: Path, tmp_path: Path
) -> None:
    conforms(AUTO_CASES[name], model_root, tmp_path)


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.usefixtures("unknown")
def test_auto_compiles_as_the_table_does(model_root: Path, tmp_path: Path) -> None:
    conforms(AUTO_CASES["stablelm"], model_root, tmp_path, enforce_eager=False)


@pytest.mark.engine
@pytest.mark.usefixtures("unknown")
def test_auto_refuses_a_class_that_scales_what_its_sublayers_write(
    model_root: Path, tmp_path: Path
) -> None:
    path = models.save("granitemoe", model_root)
    message = start(path, tmp_path, decoder_layer="auto")
    assert "GraniteMoeDecoderLayer" in message and "at layer 0" in message
    assert "not the one it was given plus what attention and the MLP wrote" in message


class Part(nn.Module):
    """Attention or an MLP, with a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.o_proj = nn.Linear(D, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o_proj(x)


class Layer(nn.Module):
    """A pre-norm layer that returns its stream, and something else beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp = Part(), Part()
        self.post_attention_layernorm = nn.LayerNorm(D)

    def forward(self, hidden_states: torch.Tensor) -> Any:
        x = hidden_states + self.self_attn(hidden_states)
        return x + self.mlp(self.post_attention_layernorm(x)), x


class NormsOutputs(Layer):
    def forward(self, hidden_states: torch.Tensor) -> Any:
        x = hidden_states + self.post_attention_layernorm(self.self_attn(hidden_states))
        return x + self.mlp(x), x


class NormReadsAttention(Layer):
    def forward(self, hidden_states: torch.Tensor) -> Any:
        written = self.self_attn(hidden_states)
        self.post_attention_layernorm(written)
        x = hidden_states + written
        return x + self.mlp(x), x


class Scales(Layer):
    def forward(self, hidden_states: torch.Tensor) -> Any:
        x = hidden_states + 1.01 * self.self_attn(hidden_states)
        return x + self.mlp(self.post_attention_layernorm(x)), x


class MlpReadsAnother(Layer):
    def forward(self, hidden_states: torch.Tensor) -> Any:
        x = hidden_states + self.self_attn(hidden_states)
        self.post_attention_layernorm(x)
        return x + self.mlp(x), x


class AddsToAttention(Part):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o_proj(x) + 1


class AttentionWritesMore(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = AddsToAttention()


class Pair(Layer):
    """Returns two summands of its stream."""

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor) -> Any:
        x = hidden_states + residual
        x = x + self.self_attn(x)
        return self.mlp(self.post_attention_layernorm(x)), x


class Model(nn.Module):
    """Layers in a row; `between` is between them, `last` reads the last output."""

    def __init__(self, layer: type[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([layer(), layer()])

    def between(self, out: tuple[torch.Tensor, torch.Tensor]) -> tuple:
        return out[:1]

    def last(self, out: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return out[0]

    @torch.no_grad()
    def forward(self) -> torch.Tensor:
        out: tuple = (torch.randn(TOKENS, D),)
        if isinstance(self.layers[0], Pair):
            out = (out[0], torch.zeros(TOKENS, D))
        for layer in self.layers:
            out = self.between(layer(*out))
        return self.last(out)


class Pairs(Model):
    def between(self, out: tuple[torch.Tensor, torch.Tensor]) -> tuple:
        return out

    def last(self, out: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return out[0] + out[1]


class ReadsOneOfTwo(Pairs):
    """Ends with a norm that reads one summand."""

    def last(self, out: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return out[0]


class ReadsBoth(Model):
    """Ends with a norm that reads what a single-stream layer returns beside it."""

    def between(self, out: tuple[torch.Tensor, torch.Tensor]) -> tuple:
        self.beside = out[1]
        return out[:1]

    def last(self, out: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return out[0] + self.beside


class ScalesBetween(Model):
    def between(self, out: tuple[torch.Tensor, torch.Tensor]) -> tuple:
        return (out[0] * 1.5,)


class SkipsALayer(Model):
    @torch.no_grad()
    def forward(self) -> torch.Tensor:
        return self.layers[0](torch.randn(TOKENS, D))[0]


@pytest.mark.parametrize("model", [Model(Layer), Pairs(Pair)], ids=["stream", "pair"])
def test_what_does_as_its_names_say_is_trusted_in_its_own_model(model: Model) -> None:
    assert not has_known_layers(model)
    family = trust_unknown_layers(model, model.forward)
    assert family is not None
    assert (family.residual is not None) == isinstance(model, Pairs)
    other = type(model)(type(model.layers[0]))
    assert has_known_layers(model) and not has_known_layers(other)


WRONG = [
    (Model(Scales), "plus what attention and the MLP wrote"),
    (Model(NormsOutputs), "plus what attention and the MLP wrote"),
    (Model(NormReadsAttention), "norm before the MLP does not read the stream"),
    (Model(MlpReadsAnother), "MLP does not read what the norm"),
    (Model(AttentionWritesMore), "does not return what its output projection"),
    (ReadsOneOfTwo(Pair), "not read as the sum of its parts"),
    (ReadsBoth(Layer), "what it returns is not read as"),
    (ScalesBetween(Layer), "as the layer before returned it"),
    (SkipsALayer(Layer), "forward did not run it"),
]


@pytest.mark.parametrize(("model", "message"), WRONG)
def test_what_does_otherwise_is_refused_by_the_check(
    model: Model, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        trust_unknown_layers(model, model.forward)
    assert not has_known_layers(model)


def test_a_model_without_recognisable_layers_is_left_to_the_table() -> None:
    model = nn.Sequential(nn.Linear(D, D))
    assert trust_unknown_layers(model, Model(Layer).forward) is None
    with pytest.raises(ValueError, match="no decoder-layer class"):
        find_decoder_layers(model)


@pytest.mark.parametrize("given", ["auto", "known"])
def test_the_flag_fills_additional_config(given: str, model_root: Path) -> None:
    path = str(models.save("llama", model_root))
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    argv = ["--model", path, "--steering-decoder-layer", given]
    made = AsyncEngineArgs.from_cli_args(parser.parse_args(argv))
    assert made.additional_config == {"steering": {"decoder_layer": given}}


@pytest.mark.engine
def test_another_word_is_refused(model_root: Path, tmp_path: Path) -> None:
    path = models.save("llama", model_root)
    message = start(path, tmp_path, decoder_layer="guess")
    assert "decoder_layer: found 'guess', expected" in message
