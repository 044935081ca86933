# SPDX-License-Identifier: Apache-2.0
"""The engine on a GPU: both runners, eager, compiled and captured, say one thing.

Everything is float32, so that Hugging Face on the CPU is the oracle. vLLM's own
attention multiplies in TF32 there, which moves a plain request's log-probabilities by
about 1e-3; the tolerance is ten times that, and tokens must be equal.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from steering_testing import models, oracle
from steering_testing.engine import (
    DELTA,
    FULL,
    VECTORS,
    assert_same,
    engine,
    generate,
    params,
    runner,
    sae_spec,
    save_sae,
)
from steering_testing.reference import Clamp, DenseSAE, Edit, random_sae

from vllm import LLM

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

FAMILY = "llama"
SITES = [(1, "post_block"), (2, "post_attn"), (0, "pre_attn")]
CLAMPS = [Clamp(5, "absolute", 4.0), Clamp(9, "additive", 1.0, True)]
MODES: dict[str, tuple[str, dict[str, Any]]] = {
    "v2-graphs": ("1", {"enforce_eager": False}),
    "v2-eager": ("1", {"enforce_eager": True}),
    "v1-graphs": ("0", {"enforce_eager": False}),
}
OPTIONS = {"attention_backend": "TRITON_ATTN", "max_num_seqs": 16}
TOKENS = 10
TOLERANCE = 1e-2


@pytest.fixture(autouse=True)
def capture_is_allowed() -> None:
    """Runner V1 forbids capture, for the whole process, once it has captured."""
    from vllm.compilation.monitor import set_cudagraph_capturing_enabled

    set_cudagraph_capturing_enabled(True)


def saes() -> dict[str, DenseSAE]:
    found = {
        kind: random_sae(160, models.HIDDEN, kind, 11) for kind in ("jumprelu", "topk")
    }
    for sae in found.values():
        sae.skip_token_ids = (models.BOS, models.EOS, models.PAD)
    return found


def vector() -> torch.Tensor:
    rng = torch.Generator().manual_seed(4)
    return torch.randn(models.HIDDEN, generator=rng)


def save_modules(root: Path) -> dict[str, str]:
    from safetensors.torch import save_file

    modules = {
        kind: save_sae(root / kind, {site: sae for site in SITES})
        for kind, sae in saes().items()
    }
    save_file({"layers.1.post_block": vector()}, root / "vector.safetensors")
    return {**modules, "vector": str(root / "vector.safetensors")}


def prompt(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [models.BOS, *(rng.randrange(3, models.VOCAB) for _ in range(length - 1))]


def cases() -> list[tuple[dict[str, Any], dict[tuple[int, str], list[Edit]]]]:
    """Requests as a client writes them, and what the oracle does for each."""
    found: list[tuple[dict[str, Any], dict[tuple[int, str], list[Edit]]]] = [({}, {})]
    for kind, sae in saes().items():
        for phase in ("both", "prefill", "decode"):
            for site in SITES:
                spec = sae_spec(kind, {site: CLAMPS}, phase)
                edit = Edit("full", sae, CLAMPS, phase=phase)
                found.append(({FULL: [spec]}, {site: [edit]}))
        spec = sae_spec(kind, {SITES[0]: CLAMPS})
        found.append(({DELTA: [spec]}, {SITES[0]: [Edit("delta", sae, CLAMPS)]}))
    at_all = sae_spec("jumprelu")
    sae = saes()["jumprelu"]
    found.append(({FULL: [at_all]}, {site: [Edit("full", sae)] for site in SITES}))
    added = {"module_name": "vector", "scale": 0.5}
    every = {VECTORS: [added], DELTA: [sae_spec("topk", {SITES[0]: CLAMPS})]}
    every[FULL] = [sae_spec("jumprelu", {SITES[0]: CLAMPS[:1]})]
    edits = [
        Edit("additive", vector=vector().double(), scale=0.5),
        Edit("delta", saes()["topk"], CLAMPS),
        Edit("full", sae, CLAMPS[:1]),
    ]
    found.append((every, {SITES[0]: edits}))
    return found


def check(llm: LLM, tokens: int = TOKENS) -> None:
    asked = cases()
    prompts = [prompt(at, 6 + at) for at in range(len(asked))]
    found = generate(llm, prompts, [params(tokens, **specs) for specs, _ in asked])
    model = models.build(FAMILY)
    for at, (specs, sites) in enumerate(asked):
        expected = oracle.greedy(model, prompts[at], sites, tokens)
        assert_same(found[at], expected, f"case {at}: {specs}", TOLERANCE)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_equals_hugging_face(
    mode: str, model_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_v2, options = MODES[mode]
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", use_v2)
    modules = save_modules(tmp_path)
    with engine(FAMILY, model_root, modules, **{**OPTIONS, **options}) as llm:
        is_v2 = "worker.gpu.model_runner" in type(runner(llm)).__module__
        assert is_v2 == (use_v2 == "1")
        check(llm)
        # The same captured graphs with other rows, clamps and batch order.
        llm.reset_prefix_cache()
        check(llm)
        runner(llm).steering.check_integrity()


@pytest.mark.parametrize("use_v2", ["0", "1"])
def test_chunks_preemption_and_graphs_together(
    use_v2: str, model_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", use_v2)
    options = {
        **OPTIONS,
        "enforce_eager": False,
        "max_num_batched_tokens": 24,
        "num_gpu_blocks_override": 24,
        "max_model_len": 128,
        "block_size": 16,
    }
    with engine(FAMILY, model_root, save_modules(tmp_path), **options) as llm:
        check(llm, tokens=24)


def test_draft_tokens_are_steered_as_the_positions_they_are(
    model_root: Path, tmp_path: Path
) -> None:
    speculation = {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_max": 3,
        "prompt_lookup_min": 1,
    }
    options = {**OPTIONS, "enforce_eager": False, "speculative_config": speculation}
    with engine(FAMILY, model_root, save_modules(tmp_path), **options) as llm:
        check(llm, tokens=16)


def test_plain_requests_equal_a_stock_engines_in_bfloat16(
    model_root: Path, tmp_path: Path
) -> None:
    options = {"enforce_eager": False, "dtype": "bfloat16", "max_num_seqs": 16}
    prompts = [prompt(at, 9) for at in range(8)]
    with engine(FAMILY, model_root, None, **options) as llm:
        stock = generate(llm, prompts, [params(TOKENS)] * 8)
    spec = sae_spec("jumprelu", {SITES[0]: CLAMPS})
    sampling = [params(TOKENS, **({FULL: [spec]} if at % 2 else {})) for at in range(8)]
    with engine(FAMILY, model_root, save_modules(tmp_path), **options) as llm:
        mixed = generate(llm, prompts, sampling)
    for at in range(0, 8, 2):
        assert mixed[at].tokens == stock[at].tokens
    assert any(mixed[at].tokens != stock[at].tokens for at in range(1, 8, 2))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("split", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_ranks_agree(split: str, model_root: Path, tmp_path: Path) -> None:
    options = {**OPTIONS, "enforce_eager": False, split: 2}
    with engine(FAMILY, model_root, save_modules(tmp_path), **options) as llm:
        check(llm)
