# SPDX-License-Identifier: Apache-2.0
"""What every family of the table must pass: all tiers at all hook points, as Hugging
Face with hooks around the float64 mathematics says it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from steering_testing import models, oracle
from steering_testing.engine import assert_same, engine, generate, params, runner
from steering_testing.reference import Clamp, random_sae
from steering_testing.requests import SPECIAL, Ask, Modules, Site, prompt, specs, vector

from vllm import LLM
from vllm.config.steering import HookPoint
from vllm.model_executor.layers.steering import SiteKey, SteeringSite, StepState
from vllm.model_executor.layers.steering_families import (
    FAMILIES,
    MODELS,
    TRANSFORMERS,
    DecoderLayer,
    SteeredLayer,
    attach_site,
)
from vllm.model_executor.layers.steering_reference import ReferenceBackend

pytestmark = pytest.mark.engine

MAX_TOKENS = 4
LAST = models.LAYERS - 1
HOOKS = [
    hook.value
    for hook in (HookPoint.PRE_ATTN, HookPoint.POST_ATTN, HookPoint.POST_BLOCK)
]
SITES: list[Site] = [(layer, hook) for layer in (0, 1, LAST) for hook in HOOKS]


@dataclass(frozen=True)
class Case:
    """A tiny model, and the class of the decoder layer that runs it."""

    family: str
    layer_class: str
    options: tuple[tuple[str, Any], ...] = ()


# Every line of the family table has a case here, or a test below fails.
CASES = {
    "gemma2": Case("gemma2", f"{MODELS}.gemma2.Gemma2DecoderLayer"),
    "gemma3": Case("gemma3", f"{MODELS}.gemma3.Gemma3DecoderLayer"),
    "llama": Case("llama", f"{MODELS}.llama.LlamaDecoderLayer"),
    "phi3": Case("phi3", f"{MODELS}.llama.LlamaDecoderLayer"),
    "mistral": Case("mistral", f"{MODELS}.mistral.MistralDecoderLayer"),
    "qwen2": Case("qwen2", f"{MODELS}.qwen2.Qwen2DecoderLayer"),
    "qwen2_moe": Case("qwen2_moe", f"{MODELS}.qwen2_moe.Qwen2MoeDecoderLayer"),
    "qwen3": Case("qwen3", f"{MODELS}.qwen3.Qwen3DecoderLayer"),
    "qwen3_moe": Case("qwen3_moe", f"{MODELS}.qwen3_moe.Qwen3MoeDecoderLayer"),
    "gpt_oss": Case("gpt_oss", f"{MODELS}.gpt_oss.TransformerBlock"),
    "gpt2": Case("gpt2", f"{MODELS}.gpt2.GPT2Block"),
}
BACKEND = (("model_impl", "transformers"),)
TRANSFORMERS_CASES = {
    f"transformers-{family}": Case(
        family, f"transformers.models.{family}.modeling_{family}.{layer}", BACKEND
    )
    for family, layer in (
        ("llama", "LlamaDecoderLayer"),
        ("gemma2", "Gemma2DecoderLayer"),
    )
}


def site_modules() -> Modules:
    """One SAE of every kind and one vector, at each hook of three layers."""
    kinds = {"pre_attn": "relu", "post_attn": "jumprelu", "post_block": "topk"}
    sae = {
        (layer, hook): random_sae(40, models.HIDDEN, kinds[hook], 11 + at, k=6)
        for at, (layer, hook) in enumerate(SITES)
    }
    for one in sae.values():
        one.skip_token_ids = SPECIAL
    vectors = {
        f"v-{layer}-{hook}": {(layer, hook): vector(3 + at, norm=4.0)}
        for at, (layer, hook) in enumerate(SITES)
    }
    return Modules({"sae": sae}, vectors)


CLAMPS = [Clamp(5, "absolute", 3.0), Clamp(11, "scale", -2.0, True)]


def requests() -> list[list[Ask]]:
    """A plain request; each tier at each site alone; all of it at once."""
    found: list[list[Ask]] = [[]]
    for layer, hook in SITES:
        site = (layer, hook)
        found += [
            [Ask("additive", f"v-{layer}-{hook}", scale=1.5)],
            [Ask("delta", "sae", {site: CLAMPS}, phase="decode")],
            [Ask("full", "sae", {site: CLAMPS})],
        ]
    everywhere = {site: [Clamp(2, "additive", 1.0)] for site in SITES}
    vectors = [Ask("additive", f"v-{at}-{hook}", scale=-0.5) for at, hook in SITES]
    found.append([*vectors, Ask("delta", "sae", everywhere), Ask("full", "sae")])
    return found


def steered_classes(llm: LLM) -> set[str]:
    """The stock classes of the layers that the engine steers."""
    layers = [
        m for m in runner(llm).get_model().modules() if isinstance(m, SteeredLayer)
    ]
    assert len(layers) == models.LAYERS
    stock = [type(layer).__mro__[2] for layer in layers]
    return {f"{cls.__module__}.{cls.__qualname__}" for cls in stock}


@contextmanager
def restored(cls: type) -> Iterator[None]:
    """Undo what the Transformers backend does to a class that the oracle needs: it
    makes the library's own model class compile itself."""
    bases, before = cls.__bases__, dict(vars(cls))
    try:
        yield
    finally:
        cls.__bases__ = bases
        for name in set(vars(cls)) - set(before):
            delattr(cls, name)
        for name, value in before.items():
            if vars(cls)[name] is not value:
                setattr(cls, name, value)


def conforms(case: Case, model_root: Path, tmp_path: Path) -> None:
    modules = site_modules()
    asked = requests()
    prompts = [prompt(at, 4 + at % 5) for at in range(len(asked))]
    sampling = [params(MAX_TOKENS, **specs(*asks)) for asks in asked]
    model = models.build(case.family)
    paths = modules.save(tmp_path)
    with (
        restored(type(model.base_model)),
        engine(case.family, model_root, paths, **dict(case.options)) as llm,
    ):
        found = generate(llm, prompts, sampling)
        assert steered_classes(llm) == {case.layer_class}
    for ids, asks, result in zip(prompts, asked, found, strict=True):
        plain = oracle.follow(model, ids, {}, result.tokens)
        expected = oracle.follow(model, ids, modules.edits(*asks), result.tokens)
        label = f"{case.family}: {asks}"
        assert_same(result, expected, label)
        moved = [
            abs(a - b) for a, b in zip(plain.logprobs, result.logprobs, strict=True)
        ]
        assert not asks or max(moved) > 1e-3, f"nothing was steered: {label}"


@pytest.mark.parametrize("name", sorted(CASES))
def test_every_tier_at_every_site_equals_hugging_face(
    name: str, model_root: Path, tmp_path: Path
) -> None:
    conforms(CASES[name], model_root, tmp_path)


def test_every_family_of_the_table_has_a_case_here() -> None:
    assert set(FAMILIES) == {case.layer_class for case in CASES.values()}


def test_every_tiny_model_has_a_case_here() -> None:
    assert set(models.FAMILIES) == {case.family for case in CASES.values()}


def save_unknown(root: Path) -> Path:
    """A tiny model of a class that is not in the table."""
    config = transformers.OPTConfig(
        vocab_size=models.VOCAB,
        hidden_size=models.HIDDEN,
        word_embed_proj_dim=models.HIDDEN,
        ffn_dim=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
    )
    path = root / "opt"
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def test_an_unknown_decoder_class_is_refused_at_start_up(tmp_path: Path) -> None:
    paths = site_modules().save(tmp_path)
    unknown = save_unknown(tmp_path)
    with pytest.raises(ValueError) as refusal:
        LLM(
            str(unknown),
            skip_tokenizer_init=True,
            dtype="float32",
            kv_cache_memory_bytes=1 << 27,
            max_model_len=64,
            enforce_eager=True,
            additional_config={
                "steering": {"modules": {"v": paths["v-0-pre_attn"]}},
            },
        )
    message = str(refusal.value)
    assert "OPTDecoderLayer" in message
    assert "To add one" in message
    assert "steering_families.py" in message
    for known in FAMILIES:
        assert known in message


@pytest.mark.parametrize("name", sorted(TRANSFORMERS_CASES))
def test_the_transformers_backend_equals_hugging_face(
    name: str, model_root: Path, tmp_path: Path
) -> None:
    conforms(TRANSFORMERS_CASES[name], model_root, tmp_path)


@pytest.mark.parametrize(
    ("name", "options"),
    [("Olmo2Config", {}), ("GPTNeoXConfig", {"use_parallel_residual": True})],
)
def test_a_layer_without_a_point_between_attention_and_mlp_has_no_post_attn_site(
    name: str, options: dict[str, Any]
) -> None:
    config = getattr(transformers, name)(**{**models.COMMON, **options})
    model = transformers.AutoModel.from_config(config)
    layer = DecoderLayer(1, model.layers[1], TRANSFORMERS)
    step = StepState(8, torch.device("cpu"))
    backend = ReferenceBackend(step)
    site = SteeringSite(SiteKey(1, HookPoint.POST_ATTN), [], None, step, backend)
    with pytest.raises(ValueError, match="no post_attn site at layer 1"):
        attach_site(layer, site)
    site = SteeringSite(SiteKey(1, HookPoint.POST_BLOCK), [], None, step, backend)
    attach_site(layer, site)
    assert isinstance(layer.module, SteeredLayer)
