# SPDX-License-Identifier: Apache-2.0
"""One batch that reaches every tier, hook point, phase and activation, for engines
whose arithmetic is not exact."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from steering_testing import models
from steering_testing.engine import generate, params
from steering_testing.oracle import Greedy, SiteEdits, hooked
from steering_testing.reference import Clamp, DenseSAE, random_sae
from steering_testing.requests import SPECIAL, Ask, Modules, Site, prompt, specs, vector

from vllm import LLM

FAMILY = "llama"
POST: Site = (1, "post_block")
SITES: list[Site] = [POST, (2, "post_attn"), (0, "pre_attn")]
CLAMPS = [Clamp(5, "absolute", 4.0), Clamp(9, "additive", 1.0, True)]


@functools.cache
def modules() -> Modules:
    """An SAE of each kind at every site, and a vector."""
    saes: dict[str, dict[Site, DenseSAE]] = {}
    for kind in ("jumprelu", "topk"):
        sae = random_sae(160, models.HIDDEN, kind, 11)
        sae.skip_token_ids = SPECIAL
        saes[kind] = {site: sae for site in SITES}
    return Modules(saes, {"vector": {POST: vector(4, norm=8.0)}})


def requests() -> list[list[Ask]]:
    """The requests of the batch; the first is plain."""
    asked: list[list[Ask]] = [[]]
    for kind in ("jumprelu", "topk"):
        for phase in ("both", "prefill", "decode"):
            asked += [
                [Ask("full", kind, {site: CLAMPS}, phase=phase)] for site in SITES
            ]
        asked.append([Ask("delta", kind, {POST: CLAMPS})])
    asked.append([Ask("full", "jumprelu")])
    every = [
        Ask("additive", "vector", scale=0.5),
        Ask("delta", "topk", {POST: CLAMPS}),
        Ask("full", "jumprelu", {POST: CLAMPS[:1]}),
    ]
    return [*asked, every]


def save(root: Path) -> dict[str, str]:
    """The engine's `modules` configuration."""
    return modules().save(root)


@torch.no_grad()
def assert_near(
    found: Greedy,
    ids: list[int],
    edits: SiteEdits,
    tolerance: float,
    label: str = "",
) -> None:
    """The continuation is one that greedy decoding can say, and is as likely.

    `oracle.follow` for inexact arithmetic: where two tokens are within the tolerance
    of each other, either may come out.
    """
    tokens = [*ids, *found.tokens[:-1]]
    model = models.build(FAMILY)
    with hooked(model, edits, tokens, len(ids)):
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0]
    scores = logits[len(ids) - 1 :].double().log_softmax(-1)
    said = scores.gather(1, torch.tensor(found.tokens)[:, None])[:, 0]
    behind = (scores.max(-1).values - said).tolist()
    off = (said - torch.tensor(found.logprobs).double()).abs().tolist()
    for at in range(len(found.tokens)):
        where = f"{label}: token {at} of {found.tokens}"
        assert behind[at] < tolerance, f"{where}: another is better by {behind[at]}"
        assert off[at] < tolerance, f"{where}: log-probability differs by {off[at]}"


def check(llm: LLM, max_tokens: int, tolerance: float = 1e-2) -> list[Greedy]:
    """Run the batch; every result is the oracle's."""
    asked = requests()
    prompts = [prompt(at, 6 + at) for at in range(len(asked))]
    sampling = [params(max_tokens, **specs(*asks)) for asks in asked]
    found = generate(llm, prompts, sampling)
    for result, ids, asks in zip(found, prompts, asked, strict=True):
        assert len(result.tokens) == max_tokens
        edits = modules().edits(*asks)
        assert_near(result, ids, edits, tolerance, f"{asks}")
    return found


def serve_every_size(llm: LLM) -> None:
    """Steered prefills from 3 to 4000 tokens a step, and decodes of 1 to 16."""
    asked = requests()
    for count, length in ((1, 3), (2, 40), (5, 60), (8, 130), (16, 250)):
        prompts = [prompt(1000 * count + at, length) for at in range(count)]
        mixed = [asked[(3 * at + count) % len(asked)] for at in range(count)]
        generate(llm, prompts, [params(3, **specs(*asks)) for asks in mixed])
