# SPDX-License-Identifier: Apache-2.0
"""An SAE of which every rank has a copy, at the first layer and at the last one, in an
engine of several ranks."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
from steering_testing import models, oracle
from steering_testing.engine import (
    FULL,
    assert_same,
    generate,
    params,
    sae_spec,
    save_sae,
)
from steering_testing.reads import activations, assert_reads
from steering_testing.reference import Clamp, DenseSAE, Edit, random_sae
from steering_testing.requests import Ask, Modules, Site, specs, vector

from vllm import LLM
from vllm.exceptions import VLLMValidationError

FAMILY = "llama"
NAME = "copied"
# Of two pipeline stages, the first has layers 0 and 1, the second layer 2.
SITES: list[Site] = [(0, "post_block"), (2, "post_block")]
INLINE = {"post_block.0": 1, "post_block.2": 1}
CLAMPS = [Clamp(5, "absolute", 4.0)]
PROMPTS = [[models.BOS, 9, 30, 51, 77], [models.BOS, 40, 41], [models.BOS, 8, 7]]


@functools.cache
def sae() -> DenseSAE:
    return random_sae(96, models.HIDDEN, "jumprelu", 3)


def save(root: Path) -> dict[str, Any]:
    """An entry of the engine's `modules`."""
    path = save_sae(root / NAME, dict.fromkeys(SITES, sae()))
    return {NAME: {"path": path, "sharding": "replicate"}}


def check_requests(llm: LLM) -> None:
    """Clamps at either site and at both, a request's own vector at each, and none."""
    asked = [{site: CLAMPS} for site in SITES] + [dict.fromkeys(SITES, CLAMPS)]
    own = [
        Ask("additive", vector=vector(at), site=site) for at, site in enumerate(SITES)
    ]
    sampling = [params(8, **{FULL: [sae_spec(NAME, clamps)]}) for clamps in asked]
    edits: list[oracle.SiteEdits] = [
        {site: [Edit("full", sae(), CLAMPS)] for site in sites} for sites in asked
    ]
    sampling += [params(8, **specs(*own)), params(8)]
    edits += [Modules().edits(*own), {}]
    prompts = [PROMPTS[at % len(PROMPTS)] for at in range(len(edits))]
    model = models.build(FAMILY)
    found = generate(llm, prompts, sampling)
    for at, (ids, sites) in enumerate(zip(prompts, edits, strict=True)):
        assert_same(found[at], oracle.greedy(model, ids, sites, 8), f"request {at}")


def check_reading(llm: LLM, stages: int = 1) -> None:
    """The last stage's features are read; the first stage's are refused by name."""
    last, prompt = SITES[1], PROMPTS[0]
    spec = {"module_name": NAME, "sites": {"post_block": [last[0]]}, "top_k": 6}
    inputs = [{"prompt_token_ids": prompt}]
    wanted = params(8, sae_readout_specs=[spec])
    (output,) = llm.generate(inputs, wanted, use_tqdm=False)
    answer = list(output.outputs[0].token_ids)
    seen = activations(models.build(FAMILY), prompt, answer, {last: sae()})[last]
    n = len(prompt)
    record = output.prompt_sae_features[NAME]["post_block.2"]
    assert_reads(record, seen[:n], 0, top_k=6)
    record = output.outputs[0].sae_features[NAME]["post_block.2"]
    assert_reads(record, seen[n:], n, top_k=6)
    if stages > 1:
        first = {**spec, "sites": {"post_block": [SITES[0][0]]}}
        with pytest.raises(VLLMValidationError, match="last pipeline stage"):
            llm.generate(inputs, params(8, sae_readout_specs=[first]))
