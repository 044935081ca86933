# SPDX-License-Identifier: Apache-2.0
"""One batch that reaches every tier, hook point, phase and activation, for engines
whose arithmetic is not exact."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from steering_testing import models
from steering_testing.engine import generate, params
from steering_testing.oracle import Greedy, SiteEdits, hooked
from steering_testing.reference import Clamp, DenseSAE, random_sae
from steering_testing.requests import Ask, Modules, Site, prompt, specs, vector

from vllm import LLM

FAMILY = "llama"
POST: Site = (1, "post_block")
SITES: list[Site] = [POST, (2, "post_attn"), (0, "pre_attn")]
TIE = 5e-4  # TF32 attention moves scores by about this much
MOST_TIES = 8  # of a request's tokens; each doubles the continuations to try
CLAMPS = [Clamp(5, "absolute", 4.0), Clamp(9, "additive", 1.0, True)]


@functools.cache
def modules() -> Modules:
    """An SAE of each kind at every site, and a vector."""
    saes: dict[str, dict[Site, DenseSAE]] = {}
    for kind in ("jumprelu", "topk"):
        sae = random_sae(160, models.HIDDEN, kind, 11)
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


@dataclass
class Ties:
    """Near ties that a sequence meets, numbered in their order; which way each falls.

    A score within `TIE` of the threshold, of the score that TopK leaves out, or of a
    condition's bound, falls on either side in arithmetic that is not exact, and what
    follows differs by a whole activation.
    """

    choices: tuple[bool, ...] = ()
    met: int = 0

    def other_side(self) -> bool:
        """Whether the next near tie falls the other way than in float64."""
        at = self.met
        self.met += 1
        return at < len(self.choices) and self.choices[at]


class Undecided(DenseSAE):
    """An SAE whose near ties `ties` decides; `bounds` are those of conditions."""

    ties: Ties
    bounds: list[tuple[int, float]]

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        acts = super().encode(x)
        pre = self.W_enc @ x + self.b_enc
        if self.k is not None:
            best = pre.topk(self.k + 1)
            inside, outside = (int(i) for i in best.indices[-2:])
            if pre[inside] - pre[outside] < TIE and self.ties.other_side():
                kept = pre[outside].clamp(min=0) if self.topk_relu else pre[outside]
                acts[inside], acts[outside] = 0.0, kept
        else:
            bar = torch.zeros_like(pre)
            if self.threshold is not None:
                bar = self.threshold.clamp(min=0)
            for i in ((pre - bar).abs() < TIE).nonzero()[:, 0].tolist():
                if self.ties.other_side():
                    acts[i] = 0.0 if acts[i] else pre[i]
        for feature, bound in self.bounds:
            if abs(acts[feature] - bound) < TIE and self.ties.other_side():
                acts[feature] = 2 * bound - acts[feature]
        return acts


def decide(edits: SiteEdits, choices: tuple[bool, ...]) -> Ties:
    """Let these choices decide the near ties of all the edits' SAEs."""
    ties = Ties(choices)
    for edit in (edit for at in edits.values() for edit in at if edit.sae):
        values = {f.name: getattr(edit.sae, f.name) for f in fields(DenseSAE)}
        edit.sae = Undecided(**values)
        edit.sae.ties = ties
        conditions = {clamp.when for clamp in edit.clamps if clamp.when is not None}
        edit.sae.bounds = sorted((feature, bound) for feature, _, bound in conditions)
    return ties


@torch.no_grad()
def departs(
    model: Any, found: Greedy, ids: list[int], edits: SiteEdits, tolerance: float
) -> str | None:
    """Why greedy decoding with these edits does not give `found`; None if it does.

    `oracle.follow` for inexact arithmetic: where two tokens are within the tolerance
    of each other, either may come out.
    """
    tokens = [*ids, *found.tokens[:-1]]
    with hooked(model, edits, tokens, len(ids)):
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0]
    scores = logits[len(ids) - 1 :].double().log_softmax(-1)
    said = scores.gather(1, torch.tensor(found.tokens)[:, None])[:, 0]
    behind = (scores.max(-1).values - said).tolist()
    off = (said - torch.tensor(found.logprobs).double()).abs().tolist()
    for at in range(len(found.tokens)):
        where = f"token {at} of {found.tokens}"
        if not behind[at] < tolerance:
            return f"{where}: another is better by {behind[at]}"
        if not off[at] < tolerance:
            return f"{where}: log-probability differs by {off[at]}"
    return None


def assert_near(
    found: Greedy,
    ids: list[int],
    edits: SiteEdits,
    tolerance: float,
    label: str = "",
    family: str = FAMILY,
) -> None:
    """`assert_near_of` for a family's tiny model."""
    assert_near_of(models.build(family), found, ids, edits, tolerance, label)


def assert_near_of(
    model: Any,
    found: Greedy,
    ids: list[int],
    edits: SiteEdits,
    tolerance: float,
    label: str = "",
) -> None:
    """The continuation is that of greedy decoding, with near ties either way."""
    ties = decide(edits, ())
    first = departs(model, found, ids, edits, tolerance)
    if first is None:
        return
    count = ties.met
    assert count <= MOST_TIES, f"{label}: {first}, and {count} near ties"
    for choices in itertools.product((False, True), repeat=count):
        decide(edits, choices)
        if departs(model, found, ids, edits, tolerance) is None:
            return
    raise AssertionError(f"{label}: {first}, whichever way {count} near ties fall")


def check(llm: LLM, max_tokens: int, tolerance: float = 1e-2) -> list[Greedy]:
    """Run the batch and compare every result with the oracle."""
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
