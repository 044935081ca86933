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
from steering_testing import models
from steering_testing.backend_cases import BACKEND_CASES
from steering_testing.cases import (
    AUTO_CASES,
    CASES,
    GPU_CASES,
    MULTIMODAL_CASES,
    TRANSFORMERS_CASES,
    Case,
)
from steering_testing.conformance import conforms

from vllm.config.steering_points import HookPoint
from vllm.model_executor.layers.steering import SiteKey, SteeringSite
from vllm.model_executor.layers.steering_attach import SteeredLayer, attach_site
from vllm.model_executor.layers.steering_families import (
    FAMILIES,
    MODELS,
    DecoderLayer,
)
from vllm.model_executor.layers.steering_hugging_face import hugging_face_family
from vllm.model_executor.layers.steering_reference_backend import ReferenceBackend
from vllm.model_executor.layers.steering_state import StepState

pytestmark = pytest.mark.engine

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
    groups = (CASES, MULTIMODAL_CASES, GPU_CASES)
    cases = [case for group in groups for case in group.values()]
    assert set(FAMILIES) == set().union(*(case.classes for case in cases))


def test_the_table_in_the_docs_is_the_one_that_the_cases_make() -> None:
    page = (ROOT / "docs/features/models.md").read_text()
    made = runpy.run_path(str(ROOT / "tools/conformance_table.py"))["table"]()
    assert made in page, "run tools/conformance_table.py --write"


def test_every_tiny_model_has_a_case_here() -> None:
    groups = (CASES, TRANSFORMERS_CASES, BACKEND_CASES, GPU_CASES, AUTO_CASES)
    cases = [case for group in groups for case in group.values()]
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
        family.mlp_unless,
        family.gate,
        family.attention_beside,
        family.scale,
        *family.attention,
    }
    for name in names - {None}:
        assert re.search(rf"self\.{name}\b", source), name


@pytest.mark.parametrize("name", named(TRANSFORMERS_CASES))
def test_the_transformers_backend_equals_hugging_face(
    name: str, model_root: Path, tmp_path: Path
) -> None:
    conforms(TRANSFORMERS_CASES[name], model_root, tmp_path)


def test_hugging_faces_layer_with_experts_beside_the_mlp_has_no_mlp_points() -> None:
    layer = models.decoder_layers(models.build("gemma4_moe"))[1]
    family = hugging_face_family(layer)
    assert family is not None
    assert (family.mlp, family.mid_norm) == (None, "pre_feedforward_layernorm")
    dense = hugging_face_family(models.decoder_layers(models.build("gemma4"))[1])
    assert dense is not None and dense.mlp == "mlp"


def test_hugging_faces_layer_with_several_streams_is_no_known_layer() -> None:
    names = ("num_kv_shared_layers", "laurel_rank", "altup_num_inputs")
    sizes = {
        **{key: models.COMMON[key] for key in ("hidden_size", "num_hidden_layers")},
        "intermediate_size": 96,
        "layer_types": ["sliding_attention"] * models.LAYERS,
        "activation_sparsity_pattern": [0.0] * models.LAYERS,
        "vocab_size": models.VOCAB,
        "vocab_size_per_layer_input": models.VOCAB,
        "hidden_size_per_layer_input": 8,
        **dict.fromkeys(names, 2),
    }
    config = transformers.Gemma3nTextConfig(**sizes)
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    assert hugging_face_family(model.layers[1]) is None


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
