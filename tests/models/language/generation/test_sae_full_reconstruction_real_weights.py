# SPDX-License-Identifier: Apache-2.0
"""Gemma-2-2B with a real Gemma Scope site: pure reconstruction, and a feature held.

The real weights need a CUDA device and a Hugging Face token (the model is gated).
The same code path runs everywhere on made-up weights in Gemma Scope's layout.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from steering_testing import models, oracle
from steering_testing.engine import (
    FULL,
    assert_same,
    engine,
    generate,
    params,
    sae_spec,
)
from steering_testing.reference import Clamp, Edit, random_sae

pytestmark = pytest.mark.engine

MODEL = "google/gemma-2-2b"
SCOPE = "hf:google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71"
LAYER, FEATURE, STRENGTH = 20, 34, 250.0
TOKEN = os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN")


def write_scope(root: Path) -> Path:
    """A Gemma Scope directory (`RELEASE/layer_L/width_W/average_l0_N/params.npz`)."""
    sae = random_sae(96, models.HIDDEN, "jumprelu", 21)
    assert sae.threshold is not None
    release = root / "gemma-scope-2b-pt-res"
    path = release / "layer_1" / "width_96" / "average_l0_9"
    path.mkdir(parents=True)
    np.savez(
        path / "params.npz",
        W_enc=sae.W_enc.T.float().numpy(),
        b_enc=sae.b_enc.float().numpy(),
        W_dec=sae.W_dec.float().numpy(),
        b_dec=sae.b_dec.float().numpy(),
        threshold=sae.threshold.float().numpy(),
    )
    return path


def test_made_up_weights_in_gemma_scopes_layout_equal_hugging_face(
    model_root: Path, tmp_path: Path
) -> None:
    path = write_scope(tmp_path)
    sae = random_sae(96, models.HIDDEN, "jumprelu", 21)
    site = (1, "post_block")
    clamps = [Clamp(7, "absolute", 5.0)]
    prompt = [models.BOS, 9, 30, 51, 77]
    sampling = [
        params(8, **{FULL: [sae_spec("scope")]}),
        params(8, **{FULL: [sae_spec("scope", {site: clamps})]}),
    ]
    with engine("gemma2", model_root, {"scope": str(path)}) as llm:
        found = generate(llm, [prompt, prompt], sampling)
    hf = models.build("gemma2")
    for result, edit in zip(
        found, ([Edit("full", sae)], [Edit("full", sae, clamps)]), strict=True
    ):
        assert_same(result, oracle.greedy(hf, prompt, {site: edit}, 8))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.skipif(not TOKEN, reason="needs a Hugging Face token for gemma-2-2b")
def test_gemma_2_2b_keeps_its_language_and_follows_the_clamp(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm import LLM, SamplingParams

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    config = {"steering": {"modules": {"scope": SCOPE}}}
    llm = LLM(MODEL, max_model_len=512, additional_config=config)
    prompt = "The best way to spend a Sunday afternoon is"
    clamp = {"feature_idx": FEATURE, "kind": "absolute", "value": STRENGTH}
    specs = [None, {"module_name": "scope", "clamps": []}]
    specs.append({"module_name": "scope", "clamps": [clamp]})
    sampling = [
        SamplingParams(
            temperature=0, max_tokens=60, extra_args={FULL: [spec]} if spec else None
        )
        for spec in specs
    ]
    texts = [output.outputs[0].text for output in llm.generate([prompt] * 3, sampling)]
    assert len(set(texts)) == 3
    # A reconstruction that breaks the language repeats itself at once.
    words = texts[1].split()
    assert len(set(words)) > len(words) / 3, texts[1]
