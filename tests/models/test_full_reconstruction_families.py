# SPDX-License-Identifier: Apache-2.0
"""Full reconstruction equals Hugging Face with hooks, for every supported family."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from steering_testing import models, oracle
from steering_testing.cases import CASES, TRANSFORMERS_CASES
from steering_testing.conformance import case_engine
from steering_testing.engine import (
    FULL,
    assert_same,
    generate,
    params,
    sae_spec,
    save_sae,
)
from steering_testing.reference import Clamp, DenseSAE, Edit, random_sae

pytestmark = pytest.mark.engine

SITE = (1, "post_block")
ACTIVATIONS = ("relu", "jumprelu", "topk")
CLAMPS = {
    "relu": [Clamp(5, "absolute", 3.0), Clamp(11, "scale", 2.0)],
    "jumprelu": [Clamp(90, "additive", 2.5), Clamp(3, "absolute", 4.0, True)],
    "topk": [Clamp(40, "absolute", 5.0), Clamp(8, "scale", -1.5, True)],
}
MAX_TOKENS = 6
# What vLLM has no class for runs under its Transformers backend.
HOW = {case.family: case for case in (*TRANSFORMERS_CASES.values(), *CASES.values())}
EXACT = sorted(family for family, case in HOW.items() if case.tolerance is None)
# One of each kind of layer: parallel sublayers, latent attention, norms of outputs
# alone, norms of inputs and outputs, LayerNorm, scaled sublayers, RMSNorm, experts.
QUICK = {
    *("cohere", "deepseek_v2", "exaone4", "gemma3", "gpt2", "granite", "llama"),
    "mixtral",
}


def saes() -> dict[str, DenseSAE]:
    found = {kind: random_sae(96, models.HIDDEN, kind, 7) for kind in ACTIVATIONS}
    return found


def prompt(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [models.BOS, *(rng.randrange(3, models.VOCAB) for _ in range(length - 1))]


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in EXACT
    ],
)
def test_every_activation_and_phase_equals_hugging_face_in_one_batch(
    family: str, model_root: Path, tmp_path: Path
) -> None:
    oracles = saes()
    modules = {
        kind: save_sae(tmp_path / kind, {SITE: sae}) for kind, sae in oracles.items()
    }
    requests = [
        (kind, p) for kind in ACTIVATIONS for p in ("prefill", "decode", "both")
    ]
    prompts = [prompt(at, 5 + at) for at in range(len(requests) + 2)]
    sampling = [
        params(MAX_TOKENS, **{FULL: [sae_spec(kind, {SITE: CLAMPS[kind]}, phase)]})
        for kind, phase in requests
    ]
    sampling += [params(MAX_TOKENS), params(MAX_TOKENS, **{FULL: [sae_spec("relu")]})]
    model, case = models.build(family), HOW[family]
    with case_engine(case, model_root, modules) as llm:
        found = generate(llm, prompts, sampling)

    edits = [
        [Edit("full", oracles[kind], CLAMPS[kind], phase=phase)]
        for kind, phase in requests
    ]
    edits += [[], [Edit("full", oracles["relu"])]]
    for at, (result, edit) in enumerate(zip(found, edits, strict=True)):
        sites = {SITE: edit} if edit else {}
        expected = oracle.greedy(model, prompts[at], sites, MAX_TOKENS)
        label = f"{family} {[(e.sae.activation, e.phase) for e in edit if e.sae]}"
        assert_same(result, expected, label)
    plain = oracle.greedy(model, prompts[0], {}, MAX_TOKENS)
    assert abs(plain.logprobs[0] - found[0].logprobs[0]) > 1e-3, "nothing was steered"
