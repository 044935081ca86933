# SPDX-License-Identifier: Apache-2.0
"""Reading features of every family, against Hugging Face with hooks."""

from __future__ import annotations

from pathlib import Path

import pytest
from steering_testing import models
from steering_testing.cases import CASES
from steering_testing.conformance import case_engine
from steering_testing.engine import params, save_sae
from steering_testing.reads import activations, assert_reads
from steering_testing.reference import random_sae

pytestmark = pytest.mark.engine

POINTS = [(0, "pre_attn"), (1, "post_attn"), (2, "post_block")]
# Of a float32 model.
TOLERANCE = 1e-5
QUICK = ("llama", "gpt2")
PROMPTS = [[5, 9, 33, 71, 12], [models.BOS, 40, 41, 7]]


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
    case = CASES[family]
    sites = [site for site in POINTS if site[1] not in case.lacks]
    sae = random_sae(96, models.HIDDEN, "jumprelu", seed=4)
    sae.skip_token_ids = (models.BOS, models.EOS, models.PAD)
    path = save_sae(tmp_path / "sae", {site: sae for site in sites})
    spec = {"module_name": "sae", "top_k": 6}
    sampling = params(5, sae_readout_specs=[spec])
    inputs = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    with case_engine(case, model_root, {"sae": path}) as llm:
        outputs = llm.generate(inputs, sampling, use_tqdm=False)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        answer = list(output.outputs[0].token_ids)
        saes = {site: sae for site in sites}
        seen = activations(models.build(case.family), prompt, answer, saes)
        n = len(prompt)
        for layer, hook in sites:
            name, whole = f"{hook}.{layer}", seen[layer, hook]
            record = output.prompt_sae_features["sae"][name]
            assert_reads(record, whole[:n], 0, top_k=6, tolerance=TOLERANCE)
            if any(acts is not None for acts in whole[n:]):
                record = output.outputs[0].sae_features["sae"][name]
                assert_reads(record, whole[n:], n, top_k=6, tolerance=TOLERANCE)
