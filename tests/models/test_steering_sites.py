# SPDX-License-Identifier: Apache-2.0
"""What every family of the table must pass: all tiers at all hook points, as Hugging
Face with hooks around the float64 mathematics says it."""

from __future__ import annotations

import importlib
import inspect
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from steering_testing import models, oracle
from steering_testing.cases import (
    CASES,
    LAST,
    MULTIMODAL_CASES,
    TRANSFORMERS_CASES,
    UNCHECKED,
    Case,
)
from steering_testing.engine import (
    assert_same,
    engine,
    generate,
    params,
    runner,
)
from steering_testing.reference import Clamp, random_sae, random_transcoder
from steering_testing.requests import SPECIAL, Ask, Modules, prompt, specs, vector

from vllm import LLM
from vllm.config.steering import HookPoint
from vllm.model_executor.layers.steering import SiteKey, SteeringSite, StepState
from vllm.model_executor.layers.steering_attach import SteeredLayer, attach_site
from vllm.model_executor.layers.steering_families import (
    FAMILIES,
    MODELS,
    DecoderLayer,
    hugging_face_family,
    points_of,
)
from vllm.model_executor.layers.steering_reference import ReferenceBackend

pytestmark = pytest.mark.engine

MAX_TOKENS = 4
ROOT = Path(__file__).parents[2]
# These run in `make test`; the others are breadth.
QUICK = {"gemma2", "qwen3"}


def named(cases: dict[str, Case]) -> list[Any]:
    """Test parameters, marked slow unless quick."""
    slow = pytest.mark.slow
    return [
        pytest.param(name, marks=() if name in QUICK else slow)
        for name in sorted(cases)
    ]


def site_modules(case: Case) -> Modules:
    """SAEs of every kind and a vector at each site, and transcoders of two layers."""
    kinds = ("relu", "jumprelu", "topk")
    sae = {
        (layer, hook): random_sae(40, case.width(hook), kinds[at % 3], 11 + at, k=6)
        for at, (layer, hook) in enumerate(case.sites())
    }
    transcoder = {
        (layer, "mlp_in"): random_transcoder(40, kinds[layer], 50 + layer, layer == 1)
        for layer in (1, LAST)
        if "mlp_out" not in case.lacks
    }
    for one in (*sae.values(), *transcoder.values()):
        one.skip_token_ids = SPECIAL
    vectors = {
        f"v-{layer}-{hook}": {
            (layer, hook): vector(3 + at, norm=4.0, width=case.width(hook))
        }
        for at, (layer, hook) in enumerate(case.sites())
    }
    saes = {"sae": sae, "transcoder": transcoder} if transcoder else {"sae": sae}
    return Modules(saes, vectors)


CLAMPS = [Clamp(5, "absolute", 3.0), Clamp(11, "scale", -2.0, True)]


def requests(case: Case, modules: Modules) -> list[list[Ask]]:
    """A plain request; each tier at each site alone; all of it at once."""
    found: list[list[Ask]] = [[]]
    for layer, hook in case.sites():
        site = (layer, hook)
        found += [
            [Ask("additive", f"v-{layer}-{hook}", scale=1.5)],
            [Ask("delta", "sae", {site: CLAMPS}, phase="decode")],
            [Ask("full", "sae", {site: CLAMPS})],
        ]
    everywhere = {site: [Clamp(2, "additive", 1.0)] for site in case.sites()}
    vectors = [
        Ask("additive", f"v-{at}-{hook}", scale=-0.5) for at, hook in case.sites()
    ]
    everything = [*vectors, Ask("delta", "sae", everywhere), Ask("full", "sae")]
    found.append(everything)
    for site in modules.saes.get("transcoder", {}):
        found += [
            [Ask("delta", "transcoder", {site: CLAMPS})],
            [Ask("full", "transcoder", {site: CLAMPS}, phase="decode")],
        ]
    if "transcoder" in modules.saes:
        found.append([*everything, Ask("full", "transcoder")])
    return found


def steered_classes(llm: LLM) -> set[str]:
    """The stock classes of the layers that the engine steers."""
    layers = [
        m for m in runner(llm).get_model().modules() if isinstance(m, SteeredLayer)
    ]
    assert len(layers) == models.LAYERS
    stock = [type(layer).__mro__[2] for layer in layers]
    return {f"{cls.__module__}.{cls.__qualname__}" for cls in stock}


def conforms(case: Case, model_root: Path, tmp_path: Path, **options: Any) -> None:
    modules = site_modules(case)
    asked = requests(case, modules)
    prompts = [prompt(at, 4 + at % 5) for at in range(len(asked))]
    sampling = [params(MAX_TOKENS, **specs(*asks)) for asks in asked]
    model = models.build(case.family)
    paths = modules.save(tmp_path)
    with (
        engine(
            case.family, model_root, paths, **{**dict(case.options), **options}
        ) as llm,
    ):
        layers = runner(llm).steering.modules.layers
        for layer in layers.values():
            assert [hook.value for hook in points_of(layer)] == case.hooks
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


@pytest.mark.parametrize("name", named(CASES))
def test_every_tier_at_every_point_equals_hugging_face(
    name: str, model_root: Path, tmp_path: Path
) -> None:
    conforms(CASES[name], model_root, tmp_path)


def test_every_point_of_a_compiled_engine_equals_hugging_face(
    model_root: Path, tmp_path: Path
) -> None:
    conforms(CASES["gemma2"], model_root, tmp_path, enforce_eager=False)


def test_every_family_of_the_table_has_a_case_here() -> None:
    cases = (*CASES.values(), *MULTIMODAL_CASES.values())
    checked = {case.layer_class for case in cases}
    assert not checked & set(UNCHECKED)
    assert set(FAMILIES) == checked | set(UNCHECKED)


def test_the_table_in_the_docs_is_the_one_that_the_cases_make() -> None:
    page = (ROOT / "docs/features/models.md").read_text()
    made = runpy.run_path(str(ROOT / "tools/conformance_table.py"))["table"]()
    assert made in page, "run tools/conformance_table.py --write"


def test_every_tiny_model_has_a_case_here() -> None:
    cases = (*CASES.values(), *TRANSFORMERS_CASES.values())
    assert set(models.FAMILIES) == {case.family for case in cases}


def source_of(layer_class: str) -> tuple[type, str]:
    """A decoder-layer class of the installed vLLM, and its source, bases included."""
    module, name = layer_class.rsplit(".", 1)
    cls = getattr(importlib.import_module(module), name)
    sources = [inspect.getsource(c) for c in cls.__mro__ if c.__module__[:5] == "vllm."]
    return cls, "".join(sources)


# These modules import torchvision, which tests of multimodal models have alone.
NEEDS_TORCHVISION = {
    f"{MODELS}.qwen3_5.Qwen3_5DecoderLayer",
    f"{MODELS}.qwen3_vl.Qwen3VLDecoderLayer",
    f"{MODELS}.qwen3_vl_moe.Qwen3VLMoeDecoderLayer",
}


@pytest.mark.parametrize("layer_class", sorted(set(FAMILIES) - NEEDS_TORCHVISION))
def test_the_names_in_the_table_are_those_of_the_class(layer_class: str) -> None:
    names_are_those_of_the_class(layer_class)


def names_are_those_of_the_class(layer_class: str) -> None:
    family, (cls, source) = FAMILIES[layer_class], source_of(layer_class)
    parameters = inspect.signature(cls.forward).parameters
    assert family.hidden in parameters
    assert family.residual is None or family.residual in parameters
    names = {
        family.mid_norm,
        family.mid_norm_if,
        family.mlp,
        family.attention_norm,
        family.mlp_norm,
        family.scale,
        *family.attention,
    }
    for name in names - {None}:
        assert re.search(rf"self\.{name}\b", source), name


def save_unknown(root: Path) -> Path:
    """A tiny model of a class that is not in the table."""
    config = transformers.StableLmConfig(
        **{**models.COMMON, "num_key_value_heads": 2, "num_hidden_layers": 3}
    )
    path = root / "stablelm"
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def test_an_unknown_decoder_class_is_refused_at_start_up(tmp_path: Path) -> None:
    paths = site_modules(CASES["llama"]).save(tmp_path)
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
    assert "StablelmDecoderLayer" in message
    assert "To add one" in message
    assert "steering_families.py" in message
    for known in FAMILIES:
        assert known in message


@pytest.mark.parametrize("name", named(TRANSFORMERS_CASES))
def test_the_transformers_backend_equals_hugging_face(
    name: str, model_root: Path, tmp_path: Path
) -> None:
    conforms(TRANSFORMERS_CASES[name], model_root, tmp_path)


@pytest.mark.parametrize(
    ("name", "options"),
    [("PhiConfig", {}), ("GPTNeoXConfig", {"use_parallel_residual": True})],
)
def test_a_layer_without_a_point_between_attention_and_mlp_has_no_post_attn_site(
    name: str, options: dict[str, Any]
) -> None:
    config = getattr(transformers, name)(**{**models.COMMON, **options})
    model = transformers.AutoModel.from_config(config)
    family = hugging_face_family(model.layers[1])
    assert family is not None
    layer = DecoderLayer(1, model.layers[1], family)
    step = StepState(8, torch.device("cpu"))
    backend = ReferenceBackend(step)
    site = SteeringSite(SiteKey(1, HookPoint.POST_ATTN), [], None, step, backend)
    with pytest.raises(ValueError, match="no post_attn point at layer 1"):
        attach_site(layer, site)
    site = SteeringSite(SiteKey(1, HookPoint.POST_BLOCK), [], None, step, backend)
    attach_site(layer, site)
    assert isinstance(layer.module, SteeredLayer)
