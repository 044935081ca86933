# SPDX-License-Identifier: Apache-2.0
"""Two ranks, tensor or pipeline parallel, give the answers of one rank."""

from __future__ import annotations

from pathlib import Path

import pytest
from steering_testing import models, oracle
from steering_testing.engine import (
    FULL,
    TRACED,
    assert_same,
    engine,
    generate,
    params,
    sae_spec,
    save_sae,
)
from steering_testing.reads import activations, assert_reads
from steering_testing.reference import Clamp, DenseSAE, Edit, random_sae
from steering_testing.requests import Ask, Modules, specs, vector

from vllm import LLM
from vllm.exceptions import VLLMValidationError

pytestmark = pytest.mark.engine

# The first pipeline rank owns layers 0 and 1, the second layer 2.
SITES = [(0, "post_block"), (2, "post_block")]
CLAMPS = [Clamp(5, "absolute", 4.0)]


def check_reading(llm: LLM, sae: DenseSAE, prompt: list[int], split: str) -> None:
    """The last stage's features are read; the first stage's are refused by name."""
    last = SITES[1]
    spec = {"module_name": "m", "sites": {"post_block": [last[0]]}, "top_k": 6}
    ask = {"sae_readout_specs": [spec]}
    inputs = [{"prompt_token_ids": prompt}]
    (output,) = llm.generate(inputs, params(8, **ask), use_tqdm=False)
    answer = list(output.outputs[0].token_ids)
    seen = activations(models.build("llama"), prompt, answer, {last: sae})[last]
    n = len(prompt)
    record = output.prompt_sae_features["m"]["post_block.2"]
    assert_reads(record, seen[:n], 0, top_k=6)
    record = output.outputs[0].sae_features["m"]["post_block.2"]
    assert_reads(record, seen[n:], n, top_k=6)
    if split == "pipeline_parallel_size":
        with pytest.raises(VLLMValidationError, match="last pipeline stage"):
            first = {**ask["sae_readout_specs"][0], "sites": {"post_block": [0]}}
            llm.generate(inputs, params(8, sae_readout_specs=[first]))


@pytest.mark.parametrize("split", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_two_ranks_equal_hugging_face(
    split: str,
    model_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    sae = random_sae(96, models.HIDDEN, "jumprelu", 3)
    modules = {"m": save_sae(tmp_path / "m", {site: sae for site in SITES})}
    prompts = [[models.BOS, 9, 30, 51, 77], [models.BOS, 40, 41], [models.BOS, 8, 7]]
    asked = [{site: CLAMPS} for site in SITES] + [{site: CLAMPS for site in SITES}]
    sampling = [params(8, **{FULL: [sae_spec("m", clamps)]}) for clamps in asked]
    # One request brings a vector to a site of each rank.
    own = [Ask("additive", vector=vector(at), site=SITES[at]) for at in (0, 1)]
    prompts, sampling = [*prompts, prompts[1]], [*sampling, params(8, **specs(*own))]
    options: dict[str, object] = {split: 2, "distributed_executor_backend": "mp"}
    if split == "pipeline_parallel_size":
        # vLLM's CPU runner makes the buffers between stages in its compile warm-up.
        options |= TRACED
    steering = {"inline_vectors": {"post_block.0": 1, "post_block.2": 1}}
    with engine("llama", model_root, modules, steering, **options) as llm:
        found = generate(llm, [*prompts, prompts[0]], [*sampling, params(8)])
        check_reading(llm, sae, prompts[0], split)
    model = models.build("llama")
    edits = [{site: [Edit("full", sae, CLAMPS)] for site in sites} for sites in asked]
    for at, sites in enumerate([*edits, Modules().edits(*own), {}]):
        ids = prompts[at % len(prompts)]
        assert_same(found[at], oracle.greedy(model, ids, sites, 8), f"request {at}")
