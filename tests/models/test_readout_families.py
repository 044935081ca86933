# SPDX-License-Identifier: Apache-2.0
"""Reading features of every family, against Hugging Face with hooks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from steering_testing import models
from steering_testing.cases import CASES, LAST
from steering_testing.conformance import case_engine
from steering_testing.engine import engine, params
from steering_testing.reads import activations, assert_reads
from steering_testing.reference import (
    Clamp,
    DenseSAE,
    Edit,
    random_sae,
    random_transcoder,
)
from steering_testing.requests import Ask, Modules, Site, specs

pytestmark = pytest.mark.engine

Saes = dict[Site, DenseSAE]
Edits = dict[Site, list[Edit]]

POINTS = [(0, "pre_attn"), (1, "post_attn"), (2, "post_block")]
# Of a float32 model.
TOLERANCE = 1e-5
QUICK = ("llama", "gpt2")
PROMPTS = [[5, 9, 33, 71, 12], [models.BOS, 40, 41, 7]]


CLAMPS = [Clamp(7, "additive", 3.0)]


def steering_of(sites: list[Site]) -> list[Ask]:
    """Edits at every point that is read, and the last one is reconstructed too."""
    clamps = {site: CLAMPS for site in sites}
    return [Ask("delta", "sae", clamps), Ask("full", "sae", {sites[-1]: CLAMPS})]


def check(output: Any, family: str, saes: Saes, edits: Edits) -> None:
    """Each point's record is what Hugging Face shows there."""
    prompt, answer = output.prompt_token_ids, list(output.outputs[0].token_ids)
    seen = activations(models.build(family), prompt, answer, saes, edits)
    n = len(prompt)
    for (layer, hook), whole in seen.items():
        name = f"{hook}.{layer}"
        record = output.prompt_sae_features["sae"][name]
        assert_reads(record, whole[:n], 0, top_k=6, tolerance=TOLERANCE)
        if any(acts is not None for acts in whole[n:]):
            record = output.outputs[0].sae_features["sae"][name]
            assert_reads(record, whole[n:], n, top_k=6, tolerance=TOLERANCE)


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow])
        for name in CASES
        if CASES[name].tolerance is None
    ],
)
def test_every_point_reads_what_hugging_face_shows(
    family: str, model_root: Path, tmp_path: Path
) -> None:
    """Alone, and with steering at earlier points and at the same one."""
    case = CASES[family]
    sites = [site for site in POINTS if site[1] not in case.lacks]
    sae = random_sae(96, models.HIDDEN, "jumprelu", seed=4)
    sae.skip_token_ids = (models.BOS, models.EOS, models.PAD)
    modules = Modules({"sae": {site: sae for site in sites}})
    read = [{"module_name": "sae", "top_k": 6}]
    asked: list[list[Ask]] = [[], [], steering_of(sites)]
    prompts = [*PROMPTS, PROMPTS[0]]
    sampling = [params(5, sae_readout_specs=read, **specs(*asks)) for asks in asked]
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    with case_engine(case, model_root, modules.save(tmp_path)) as llm:
        outputs = llm.generate(inputs, sampling, use_tqdm=False)
    for output, asks in zip(outputs, asked, strict=True):
        check(output, case.family, modules.saes["sae"], modules.edits(*asks))
    first, steered = (outputs[at].outputs[0].logprobs for at in (0, 2))
    assert first != steered


def test_sublayers_and_transcoders_are_read(model_root: Path, tmp_path: Path) -> None:
    case = CASES["gemma2"]
    sae = {
        (layer, hook): random_sae(40, case.width(hook), "relu", 11 + at)
        for at, (layer, hook) in enumerate(case.sites())
        if hook not in {name for _, name in POINTS}
    }
    assert {hook for _, hook in sae} >= {"attn_z", "attn_out", "mlp_out"}
    kinds = ("relu", "jumprelu", "topk")
    transcoder = {
        (layer, "mlp_in"): random_transcoder(40, kinds[layer], 50 + layer, layer == 1)
        for layer in (1, LAST)
    }
    for one in (*sae.values(), *transcoder.values()):
        one.skip_token_ids = (models.BOS, models.EOS, models.PAD)
    modules = Modules({"sae": sae, "transcoder": transcoder}, {})
    # The transcoder's answer is read while another request is reconstructed by it.
    read = [{"module_name": name, "top_k": 6} for name in ("sae", "transcoder")]
    full = {"sae_full_reconstruction_specs": [{"module_name": "transcoder"}]}
    asked = [params(4, sae_readout_specs=read), params(4, **full)]
    inputs = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    with engine(case.family, model_root, modules.save(tmp_path)) as llm:
        output, beside = llm.generate(inputs, asked, use_tqdm=False)
    assert beside.prompt_sae_features is None
    prompt, answer = PROMPTS[0], list(output.outputs[0].token_ids)
    n = len(prompt)
    for name, saes in (("sae", sae), ("transcoder", transcoder)):
        seen = activations(models.build(case.family), prompt, answer, saes)
        for (layer, hook), whole in seen.items():
            for features, first, expected in (
                (output.prompt_sae_features, 0, whole[:n]),
                (output.outputs[0].sae_features, n, whole[n:]),
            ):
                site = f"{hook}.{layer}"
                assert_reads(
                    features[name][site],
                    expected,
                    first,
                    top_k=6,
                    tolerance=TOLERANCE,
                    label=f"{name} at {site}",
                )
