# SPDX-License-Identifier: Apache-2.0
"""What every family of the table must pass: reading, as Hugging Face with hooks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from steering_testing import models
from steering_testing.cases import Case
from steering_testing.conformance import case_engine, round_weights
from steering_testing.engine import params
from steering_testing.reads import activations, assert_reads
from steering_testing.reference import Clamp, DenseSAE, Edit, random_sae
from steering_testing.requests import Ask, Modules, Site, specs

Saes = dict[Site, DenseSAE]
Edits = dict[Site, list[Edit]]

POINTS = [(0, "pre_attn"), (1, "post_attn"), (2, "post_block")]
# Of 96 features, those that rounding may move over 0.
ROUNDED_FLIPS = 9
PROMPTS = [[5, 9, 33, 71, 12], [models.BOS, 40, 41, 7]]
CLAMPS = [Clamp(7, "additive", 3.0)]


def steering_of(sites: list[Site]) -> list[Ask]:
    """Edits at every point that is read, and the last one is reconstructed too."""
    clamps = {site: CLAMPS for site in sites}
    return [Ask("delta", "sae", clamps), Ask("full", "sae", {sites[-1]: CLAMPS})]


def sae_of(case: Case) -> DenseSAE:
    """What is read. In bfloat16 with ReLU: it has no step that rounding may cross."""
    sae = random_sae(96, models.HIDDEN, "relu" if case.rounds else "jumprelu", seed=4)
    if case.rounds:
        round_weights(sae)
    return sae


def check(output: Any, case: Case, saes: Saes, edits: Edits) -> None:
    """Each point's record is what Hugging Face shows there."""
    prompt, answer = output.prompt_token_ids, list(output.outputs[0].token_ids)
    seen = activations(models.build(case.family), prompt, answer, saes, edits)
    wanted: Any = {"top_k": 6, "tolerance": case.tolerance or case.read_tolerance}
    if case.rounds:
        wanted["flips"] = ROUNDED_FLIPS
    n = len(prompt)
    for (layer, hook), whole in seen.items():
        name = f"{hook}.{layer}"
        record = output.prompt_sae_features["sae"][name]
        assert_reads(record, whole[:n], 0, **wanted)
        if any(acts is not None for acts in whole[n:]):
            record = output.outputs[0].sae_features["sae"][name]
            assert_reads(record, whole[n:], n, **wanted)


def reads_conform(case: Case, model_root: Path, tmp_path: Path) -> None:
    """Every point reads what Hugging Face shows: alone, and with steering at earlier
    points and at the same one."""
    sites = [site for site in POINTS if site[1] in case.hooks_of(site[0])]
    sae = sae_of(case)
    modules = Modules({"sae": {site: sae for site in sites}})
    read = [{"module_name": "sae", "top_k": 6}]
    asked: list[list[Ask]] = [[], [], steering_of(sites)]
    prompts = [*PROMPTS, PROMPTS[0]]
    sampling = [params(5, sae_readout_specs=read, **specs(*asks)) for asks in asked]
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    with case_engine(case, model_root, modules.save(tmp_path)) as llm:
        outputs = llm.generate(inputs, sampling, use_tqdm=False)
    for output, asks in zip(outputs, asked, strict=True):
        check(output, case, modules.saes["sae"], modules.edits(*asks))
    first, steered = (outputs[at].outputs[0].logprobs for at in (0, 2))
    assert first != steered
