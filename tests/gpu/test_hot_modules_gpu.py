# SPDX-License-Identifier: Apache-2.0
"""Modules that come and go under captured CUDA graphs, on both runners.

Float32 throughout, Hugging Face on the CPU is the oracle; for the tolerance see
`test_engine_gpu.py`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from steering_testing import models, oracle
from steering_testing.engine import (
    DELTA,
    FULL,
    assert_same,
    engine,
    generate,
    params,
    runner,
    sae_spec,
    save_sae,
)
from steering_testing.reference import Clamp, DenseSAE, Edit, random_sae
from steering_testing.requests import prompt

from vllm import LLM
from vllm.entrypoints.steering import (
    register_module,
    replace_module,
    unregister_module,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

FAMILY, SITE, TOKENS = "llama", (1, "post_block"), 8
CLAMPS = [Clamp(5, "absolute", 4.0), Clamp(9, "additive", 1.0, True)]
SPARE = [{"layer": 1, "hook": "resid_post", "width": 192}]
TOLERANCE = 1e-2


def check(llm: LLM, name: str, sae: DenseSAE) -> None:
    """A steered request of each SAE tier, and a plain one beside them."""
    ids = prompt(7, 21)
    asks = [
        params(TOKENS, **{FULL: [sae_spec(name, {SITE: CLAMPS})]}),
        params(TOKENS, **{DELTA: [sae_spec(name, {SITE: CLAMPS})]}),
        params(TOKENS),
    ]
    found = generate(llm, [ids] * 3, asks)
    model = models.build(FAMILY)
    for at, tier in enumerate(("full", "delta", None)):
        edits = {SITE: [Edit(tier, sae, CLAMPS)]} if tier else {}
        expected = oracle.greedy(model, ids, edits, TOKENS)
        assert_same(found[at], expected, str(tier), TOLERANCE)


@pytest.mark.parametrize("use_v2", ["0", "1"])
def test_captured_graphs_take_new_modules(
    use_v2: str, model_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.compilation.monitor import set_cudagraph_capturing_enabled

    set_cudagraph_capturing_enabled(True)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", use_v2)
    saes = {
        "jumprelu": random_sae(160, models.HIDDEN, "jumprelu", 3),
        "topk": random_sae(96, models.HIDDEN, "topk", 4),
    }
    paths = {}
    for kind, sae in saes.items():
        sae.skip_token_ids = (models.BOS, models.EOS, models.PAD)
        paths[kind] = save_sae(tmp_path / kind, {SITE: sae})
    options = {
        "attention_backend": "TRITON_ATTN",
        "max_num_seqs": 8,
        "enforce_eager": False,
    }
    with engine(FAMILY, model_root, {}, {"spare": SPARE}, **options) as llm:
        register_module(llm, "hot", paths["jumprelu"])
        check(llm, "hot", saes["jumprelu"])
        replace_module(llm, "hot", paths["topk"])
        check(llm, "hot", saes["topk"])
        unregister_module(llm, "hot")
        register_module(llm, "again", paths["jumprelu"], skip_token_ids=[])
        saes["jumprelu"].skip_token_ids = ()
        check(llm, "again", saes["jumprelu"])
        runner(llm).steering.check_integrity()
