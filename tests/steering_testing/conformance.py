# SPDX-License-Identifier: Apache-2.0
"""What every family of the table must pass: all tiers at all points, as Hugging Face
with hooks around the float64 mathematics says it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from steering_testing import matrix, models, oracle
from steering_testing.cases import LAST, Case
from steering_testing.engine import (
    assert_same,
    engine,
    generate,
    params,
    runner,
)
from steering_testing.oracle import Greedy
from steering_testing.reference import (
    Clamp,
    DenseSAE,
    random_sae,
    random_transcoder,
)
from steering_testing.requests import Ask, Modules, prompt, specs, vector

from vllm import LLM
from vllm.model_executor.layers.steering_attach import SteeredLayer
from vllm.model_executor.layers.steering_families import points_of

MAX_TOKENS = 4


def site_modules(case: Case) -> Modules:
    """SAEs of every kind and a vector at each site, and transcoders of two layers."""
    # In bfloat16 a feature near its threshold may fall either way; ReLU has no step.
    kinds = ("relu",) * 3 if case.rounds else ("relu", "jumprelu", "topk")
    sae = {
        (layer, hook): random_sae(40, case.width(hook), kinds[at % 3], 11 + at, k=6)
        for at, (layer, hook) in enumerate(case.sites())
    }
    transcoder = {
        (layer, "mlp_in"): random_transcoder(40, kinds[layer], 50 + layer, layer == 1)
        for layer in (1, LAST)
        if {"mlp_in", "mlp_out"} <= set(case.hooks_of(layer))
    }
    for one in (*sae.values(), *transcoder.values()):
        if case.rounds:
            round_weights(one)
    vectors = {
        f"v-{layer}-{hook}": {
            (layer, hook): vector(3 + at, norm=4.0, width=case.width(hook))
        }
        for at, (layer, hook) in enumerate(case.sites())
    }
    saes = {"sae": sae, "transcoder": transcoder} if transcoder else {"sae": sae}
    return Modules(saes, vectors)


def round_weights(sae: DenseSAE) -> None:
    """Give an SAE the matrices that a bfloat16 engine holds."""
    sae.W_enc, sae.W_dec = (w.bfloat16().double() for w in (sae.W_enc, sae.W_dec))
    if sae.W_skip is not None:
        sae.W_skip = sae.W_skip.bfloat16().double()


CLAMPS = [Clamp(5, "absolute", 3.0), Clamp(11, "scale", -2.0, True)]


def requests(case: Case, modules: Modules) -> list[list[Ask]]:
    """A plain request; each tier at each site alone; all of it at once."""
    found: list[list[Ask]] = [[]]
    for layer, hook in case.sites():
        site = (layer, hook)
        found += [
            [Ask("additive", f"v-{layer}-{hook}", scale=1.5)],
            [Ask("delta", "sae", {site: CLAMPS}, phase="decode")],
            [Ask("full", "sae", {site: CLAMPS})],
        ]
    everywhere = {site: [Clamp(2, "additive", 1.0)] for site in case.sites()}
    vectors = [
        Ask("additive", f"v-{at}-{hook}", scale=-0.5) for at, hook in case.sites()
    ]
    everything = [*vectors, Ask("delta", "sae", everywhere), Ask("full", "sae")]
    found.append(everything)
    for site in modules.saes.get("transcoder", {}):
        found += [
            [Ask("delta", "transcoder", {site: CLAMPS})],
            [Ask("full", "transcoder", {site: CLAMPS}, phase="decode")],
        ]
    if "transcoder" in modules.saes:
        found.append([*everything, Ask("full", "transcoder")])
    return found


def steered_classes(llm: LLM) -> set[str]:
    """The stock classes of the layers that the engine steers."""
    layers = [
        m for m in runner(llm).get_model().modules() if isinstance(m, SteeredLayer)
    ]
    assert len(layers) == models.LAYERS
    stock = [type(layer).__mro__[2] for layer in layers]
    return {f"{cls.__module__}.{cls.__qualname__}" for cls in stock}


@contextmanager
def case_engine(
    case: Case, model_root: Path, modules: dict[str, str], **options: Any
) -> Iterator[LLM]:
    """The engine of a case."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in case.environment:
            patch.setenv(name, value)
        options = {**dict(case.options), **options}
        with engine(case.family, model_root, modules, **options) as llm:
            yield llm


def conforms(case: Case, model_root: Path, tmp_path: Path, **options: Any) -> None:
    """Run the case's requests in one batch; every result is the oracle's."""
    modules = site_modules(case)
    asked = requests(case, modules)
    prompts = [prompt(at, 4 + at % 5) for at in range(len(asked))]
    sampling = [params(MAX_TOKENS, **specs(*asks)) for asks in asked]
    paths = modules.save(tmp_path)
    with case_engine(case, model_root, paths, **options) as llm:
        for at, layer in runner(llm).steering.modules.layers.items():
            assert [hook.value for hook in points_of(layer)] == case.hooks_of(at)
        found = generate(llm, prompts, sampling)
        assert steered_classes(llm) == case.classes
    for ids, asks, result in zip(prompts, asked, found, strict=True):
        compare(case, modules, ids, asks, result)


def compare(
    case: Case, modules: Modules, ids: list[int], asks: list[Ask], found: Greedy
) -> None:
    """The result is the oracle's, and not that of the request without steering."""
    model, edits = models.build(case.family), modules.edits(*asks)
    label = f"{case.family}: {asks}"
    plain = oracle.follow(model, ids, {}, found.tokens)
    if case.tolerance is None:
        expected = oracle.follow(model, ids, edits, found.tokens)
        assert_same(found, expected, label)
    else:
        matrix.assert_near(found, ids, edits, case.tolerance, label, case.family)
    moved = max(abs(a - b) for a, b in zip(plain.logprobs, found.logprobs, strict=True))
    assert not asks or moved > 1e-3, f"nothing was steered: {label}"
