# SPDX-License-Identifier: Apache-2.0
"""Reading features of every family, against Hugging Face with hooks."""

from __future__ import annotations

from pathlib import Path

import pytest
from steering_testing import models
from steering_testing.cases import CASES, LAST
from steering_testing.engine import engine, params
from steering_testing.read_conformance import POINTS, PROMPTS, reads_conform
from steering_testing.reads import activations, assert_reads
from steering_testing.reference import (
    random_sae,
    random_transcoder,
)
from steering_testing.requests import Modules

pytestmark = pytest.mark.engine


QUICK = ("llama", "gpt2")


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow])
        for name in CASES
    ],
)
def test_every_point_reads_what_hugging_face_shows(
    family: str, model_root: Path, tmp_path: Path
) -> None:
    reads_conform(CASES[family], model_root, tmp_path)


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
                    tolerance=case.read_tolerance,
                    label=f"{name} at {site}",
                )
