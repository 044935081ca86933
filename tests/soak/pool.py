# SPDX-License-Identifier: Apache-2.0
"""The distinct requests of a soak: bounded in number, so that each has a reference."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from steering_testing import models
from steering_testing.engine import DELTA, FULL, VECTORS, save_sae
from steering_testing.reference import Clamp, DenseSAE, random_sae
from steering_testing.requests import Ask, Modules, Site, specs, vector

from vllm import SamplingParams
from vllm.config.sae_features import ReadFeatures, SAEFeatures
from vllm.config.sae_steering_specs import PRESET_KEY
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind

D_SAE, MAX_PROMPT, MAX_TOKENS = 96, 80, 12
PRE, POST, MID, LAST = (0, "pre_attn"), (1, "post_block"), (2, "post_attn"), (
    2,
    "post_block",
)  # fmt: skip
INNER: list[Site] = [(0, "attn_z"), (1, "attn_out"), (1, "mlp_in"), (2, "mlp_out")]
# The module that is replaced and removed while the engine runs, and its versions.
HOT, VERSIONS = "hot", ("hot0", "hot1")
SPARE = [{"layer": LAST[0], "hook": LAST[1], "width": D_SAE, "count": 1}]
LARGEST = 3e38
READS = "sae_readout_specs"
# The preset that requests name.
PRESETS: dict[str, Any] = {
    "calm": specs(
        Ask("delta", "b", {POST: [Clamp(7, "absolute", 2.0)]}),
        Ask("additive", "w", scale=0.5, phase="decode"),
    )
}
# What every engine has besides modules and presets: room for a vector of a request.
OPTIONS: dict[str, Any] = {"spare": SPARE, "inline_vectors": {"post_block.1": 1}}
# A preset that comes and goes while the engine runs; nothing names it.
PASSING = ("passing", specs(Ask("additive", "v", scale=0.5)))


def sae(activation: str, seed: int) -> DenseSAE:
    found = random_sae(D_SAE, models.HIDDEN, activation, seed)
    if found.threshold is not None:
        # A pre-activation at the threshold falls on either side of it, by rounding.
        # A small threshold makes that a small difference.
        found.threshold = found.threshold * 0.05
    return found


def modules() -> Modules:
    """SAEs of every activation at sites of every hook, and vectors."""
    return Modules(
        {
            "a": {POST: sae("jumprelu", 1), PRE: sae("jumprelu", 2)},
            "b": {POST: sae("relu", 3), MID: sae("relu", 4)},
            "t": {POST: sae("topk", 5)},
            "i": {site: sae("relu", 9) for site in INNER},
        },
        {
            "v": {POST: vector(1), PRE: vector(2, norm=1.0)},
            "w": {MID: vector(3)},
        },
    )


def save_versions(root: Path) -> dict[str, str]:
    """Paths of the versions of the module that changes."""
    kinds = {"hot0": sae("relu", 7), "hot1": sae("jumprelu", 8)}
    return {name: save_sae(root / name, {LAST: kinds[name]}) for name in VERSIONS}


@dataclass
class Answer:
    """A completion: its tokens, the log-probability of each, and what was read."""

    tokens: list[int]
    scores: list[float]
    reads: list[SAEFeatures] = field(default_factory=list)


def answers_of(output: RequestOutput) -> list[Answer]:
    """What the engine said, an answer for each sample."""
    completions = sorted(output.outputs, key=lambda completion: completion.index)
    return [_answer_of(one, output.prompt_sae_features) for one in completions]


def _answer_of(completion: CompletionOutput, prompt: ReadFeatures | None) -> Answer:
    tokens = list(completion.token_ids)
    steps = completion.logprobs or []
    scores = [s[t].logprob for s, t in zip(steps, tokens, strict=True)]
    records = [
        record
        for reads in (prompt or {}, completion.sae_features or {})
        for _, sites in sorted(reads.items())
        for _, record in sorted(sites.items())
    ]
    return Answer(tokens, scores, records)


def drift(said: Answer, alone: Answer) -> float:
    """Largest difference of a log-probability or a value that was read.

    Infinite where a token or a position that was read differs.
    """
    if said.tokens != alone.tokens or not all(map(math.isfinite, said.scores)):
        return math.inf
    if len(said.reads) != len(alone.reads):
        return math.inf
    scores = zip(said.scores, alone.scores, strict=True)
    reads = zip(said.reads, alone.reads, strict=True)
    return max(
        0.0,
        *(abs(one - other) for one, other in scores),
        *(_reading_drift(one, other) for one, other in reads),
    )


def _reading_drift(said: SAEFeatures, alone: SAEFeatures) -> float:
    """As `drift`, relative to the largest value; list places may swap at a tie."""
    same = np.array_equal(said.positions, alone.positions)
    if not same or said.values.shape != alone.values.shape:
        return math.inf
    if not said.values.size:
        return 0.0
    size = max(1.0, float(np.abs(alone.values).max()))
    one, other = said.to_dense(), alone.to_dense()
    # A feature that only one of them lists is at the end of the other's list.
    both = (one != 0) & (other != 0)
    listed = np.abs(one - other)[both].max(initial=0.0)
    return max(float(listed), float(np.abs(said.values - alone.values).max())) / size


@dataclass
class Item:
    """One distinct request.

    Attributes:
        kind: for the report.
        version: of the module that changes, if the request names it.
        reference: what it says alone, one answer for each of its samples.
    """

    kind: str
    prompt: list[int]
    max_tokens: int
    extra: dict[str, Any]
    samples: int = 1
    version: str | None = None
    reference: list[Answer] = field(default_factory=list)

    def params(self, logprobs: int = 0) -> SamplingParams:
        """Greedy; several samples are drawn from the best token only."""
        return SamplingParams(
            n=self.samples,
            temperature=0.0 if self.samples == 1 else 0.8,
            top_k=0 if self.samples == 1 else 1,
            max_tokens=self.max_tokens,
            logprobs=logprobs,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args=self.extra or None,
        )


def clamps(rng: random.Random, features: range = range(D_SAE)) -> list[Clamp]:
    """Up to four ordinary clamps of distinct features."""
    kinds = {"absolute": (0.0, 4.0), "additive": (-2.0, 3.0), "scale": (-1.0, 3.0)}
    found = []
    for feature in rng.sample(features, rng.randint(1, 4)):
        kind = rng.choice(list(kinds))
        value = round(rng.uniform(*kinds[kind]), 2)
        found.append(Clamp(feature, kind, value, rng.random() < 0.3))
    return found


def phase(rng: random.Random) -> str:
    return rng.choice(["both", "both", "prefill", "decode"])


SITES: dict[str, list[Site]] = {"a": [POST, PRE], "b": [POST, MID], "t": [POST]}


def full(rng: random.Random) -> dict[str, Any]:
    name = rng.choice(list(SITES))
    return specs(Ask("full", name, {s: clamps(rng) for s in SITES[name]},
                     phase=phase(rng)))  # fmt: skip


def delta(rng: random.Random) -> dict[str, Any]:
    name = rng.choice(list(SITES))
    site = rng.choice(SITES[name])
    return specs(Ask("delta", name, {site: clamps(rng)}, phase=phase(rng)))


def additive(rng: random.Random) -> dict[str, Any]:
    scale = round(rng.uniform(-2, 2), 2)
    return specs(Ask("additive", rng.choice("vw"), scale=scale, phase=phase(rng)))


def tiers(rng: random.Random) -> dict[str, Any]:
    """All three tiers of one request, each with its own phase."""
    return specs(
        Ask("additive", "v", scale=round(rng.uniform(-1, 1), 2), phase=phase(rng)),
        Ask("delta", "a", {POST: clamps(rng)}, phase=phase(rng)),
        Ask("delta", "t", {POST: clamps(rng)}, phase=phase(rng)),
        Ask("full", "b", {MID: clamps(rng), POST: []}, phase=phase(rng)),
    )


def phases(rng: random.Random) -> dict[str, Any]:
    """Different edits of the prompt and of the answer."""
    half = D_SAE // 2
    return specs(
        Ask("delta", "b", {POST: clamps(rng, range(half))}, phase="prefill"),
        Ask("delta", "b", {POST: clamps(rng, range(half, D_SAE))}, phase="decode"),
    )


def poison(rng: random.Random) -> dict[str, Any]:
    """Absurd values, each of which is accepted."""
    value = rng.choice([LARGEST, -LARGEST, 1e30])
    feature = rng.randrange(D_SAE)
    clamp = [Clamp(feature, rng.choice(["absolute", "additive"]), value)]
    asked = [
        specs(Ask("full", "a", {POST: clamp})),
        specs(Ask("delta", "t", {POST: clamp})),
        specs(Ask("additive", "v", scale=value)),
    ]
    return rng.choice(asked)


def hot(rng: random.Random) -> dict[str, Any]:
    tier = rng.choice(["full", "delta"])
    return specs(Ask(tier, HOT, {LAST: clamps(rng)}, phase=phase(rng)))


def plain(rng: random.Random) -> dict[str, Any]:
    return {}


def spans(rng: random.Random) -> dict[str, Any]:
    """A part of the prompt, and a part of the answer."""
    asked = specs(Ask("delta", "b", {POST: clamps(rng)}))
    start = rng.randint(-10, 10)
    [spec] = asked[DELTA]
    del spec["phase"]
    spec["spans"] = [
        {"of": "prompt", "start": start},
        {"of": "generated", "start": rng.randint(0, 2), "stop": rng.randint(3, 8)},
    ]
    return asked


def reading(rng: random.Random) -> dict[str, Any]:
    """Features of a site that an edit has changed, given ones or the largest."""
    name = rng.choice("abt")
    site = SITES[name][0]
    what: dict[str, Any] = {"top_k": rng.randint(1, 6)}
    if rng.random() < 0.5:
        what = {"features": rng.sample(range(D_SAE), rng.randint(1, 4))}
    at = {site[1]: [site[0]]}
    read = {"module_name": name, "sites": at, "phase": phase(rng), **what}
    asked = rng.choice([plain, additive, delta])(rng)
    return {**asked, READS: [read]}


def preset(rng: random.Random) -> dict[str, Any]:
    """A preset by name, with or without clamps of the request's own."""
    return {**rng.choice([plain, delta])(rng), PRESET_KEY: "calm"}


def conditions(rng: random.Random) -> dict[str, Any]:
    """Clamps that act where another feature is active."""
    asked = delta(rng)
    for spec in asked[DELTA]:
        for layers in spec["clamps"].values():
            for entry in (entry for entries in layers.values() for entry in entries):
                entry["when"] = {"feature_idx": rng.randrange(D_SAE), "above": 0.0}
    return asked


def directions(rng: random.Random) -> dict[str, Any]:
    """Edits along a module's vector, in the stream's units or in its own."""
    asked = {
        "set": {"value": round(rng.uniform(-1, 1), 2)},
        "scale": {"scale": round(rng.uniform(-1, 0.9), 2)},
        "bound": {"bounds": (-round(rng.random(), 2), round(rng.random(), 2))},
        "add": {"scale": round(rng.uniform(-0.5, 0.5), 2)},
    }
    kind = rng.choice(list(asked))
    relative = kind != "scale" and rng.random() < 0.5
    one = Ask("additive", rng.choice("vw"), kind=kind, relative=relative,
              phase=phase(rng), **asked[kind])  # fmt: skip
    return specs(one)


def inline(rng: random.Random) -> dict[str, Any]:
    """A vector that the request brings; some requests bring the same one."""
    scale = round(rng.uniform(-2, 2), 2)
    own = vector(rng.randint(50, 60))
    return specs(
        Ask("additive", vector=own, site=POST, scale=scale, phase=phase(rng)),
        Ask("additive", "w", scale=0.5, phase=phase(rng)),
    )


def inner(rng: random.Random) -> dict[str, Any]:
    """What the sublayers read and add, besides the stream."""
    tier = rng.choice(["full", "delta"])
    sites = {site: clamps(rng) for site in rng.sample(INNER, 2)}
    return specs(Ask(tier, "i", sites, phase=phase(rng)))


# Kind -> how often, and what it asks for.
KINDS: dict[str, tuple[int, Callable[[random.Random], dict[str, Any]]]] = {
    "plain": (5, plain),
    "full": (4, full),
    "delta": (3, delta),
    "additive": (2, additive),
    "tiers": (3, tiers),
    "phases": (2, phases),
    "poison": (2, poison),
    HOT: (2, hot),
    "spans": (2, spans),
    "inner": (2, inner),
    "reading": (3, reading),
    "preset": (2, preset),
    "conditions": (3, conditions),
    "directions": (2, directions),
    "inline": (2, inline),
}
BAD: list[dict[str, Any]] = [
    {FULL: [{"module_name": "nobody"}]},
    {DELTA: [{"module_name": "a", "clamps": {"post_block": {"1": []}}}]},
    {VECTORS: [{"module_name": "v", "scale": float("nan")}]},
    {FULL: [{"module_name": "t", "clamps": [{"feature_idx": D_SAE, "kind": "scale",
                                             "value": 1.0}]}]},
]  # fmt: skip


def make_pool(count: int, seed: int) -> list[Item]:
    """`count` distinct requests; some share the beginning of their prompts."""
    rng = random.Random(seed)
    shared = [ordinary(rng, 40) for _ in range(4)]
    names = list(KINDS)
    weights = [KINDS[name][0] for name in names]
    found = []
    for at in range(count):
        (kind,) = rng.choices(names, weights)
        start = rng.choice(shared) if rng.random() < 0.4 else []
        ids = [*start, *ordinary(rng, rng.randint(2, MAX_PROMPT - len(start)))]
        if rng.random() < 0.5:
            ids[0] = models.BOS
        samples = rng.choice([2, 3]) if rng.random() < 0.1 else 1
        version = VERSIONS[at % 2] if kind == HOT else None
        extra = KINDS[kind][1](rng)
        found.append(
            Item(kind, ids, rng.randint(1, MAX_TOKENS), extra, samples, version)
        )
    return found


def ordinary(rng: random.Random, length: int) -> list[int]:
    """Random token ids, none of them special."""
    return [rng.randrange(3, models.VOCAB) for _ in range(length)]


def save(root: Path) -> dict[str, str]:
    """Write the modules that every engine starts with; name -> path."""
    return modules().save(root)
