# SPDX-License-Identifier: Apache-2.0
"""The Python of docs/features/research.md runs, and prints what the page shows.

Its figures are those of Hugging Face's model with forward hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from steering_testing.pages import run_page

from vllm.config.sae_steering_types import (
    SAEClampEntry,
    SAEClampSpec,
    SteeringSamplingParams,
    SteeringSpan,
)
from vllm.distributed import cleanup_dist_env_and_memory

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "features" / "research.md"
BRIDGE = 457

pytestmark = [pytest.mark.engine, pytest.mark.slow]

Edit = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What the page's blocks define, each run after the one before."""
    found: dict[str, Any] = {}
    folder = tmp_path_factory.mktemp("research")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        try:
            run_page(PAGE, found, replaced={"/tmp/my-sae": str(folder / "my-sae")})
            yield found
        finally:
            if "llm" in found:
                found["llm"].llm_engine.engine_core.shutdown()
            cleanup_dist_env_and_memory()


@torch.no_grad()
def hugging_face(names: dict[str, Any], text: int, edit: Edit) -> np.ndarray:
    """Log-probabilities of the next tokens, the stream edited after bos."""

    def hook(_module: object, _args: object, output: torch.Tensor) -> torch.Tensor:
        x = output[0, 1:]
        edited = edit(x, names["encoder"](x))
        return torch.cat([output[:, :1], edited[None]], dim=1)

    handle = names["model"].model.layers[1].register_forward_hook(hook)
    try:
        ids = torch.tensor([names["texts"][text].token_ids])
        return names["model"](ids).logits[0, :-1].double().log_softmax(-1).numpy()
    finally:
        handle.remove()


def test_activations_and_statistics_are_those_of_the_sae(names: dict[str, Any]) -> None:
    own, dense = names["own"].numpy(), names["dense"].numpy()
    np.testing.assert_allclose(dense, own, atol=1e-4 * own.max())
    maxima = names["maxima"]
    ends = np.cumsum([len(text.site()) for text in names["texts"]])
    by_text = np.split(own, ends[:-1])
    largest = np.stack([rows.max(axis=0) for rows in by_text])
    expected = largest[:, maxima.columns]
    np.testing.assert_allclose(maxima.to_numpy(), expected, atol=1e-4 * own.max())
    found = names["found"]
    np.testing.assert_allclose(found.frequency, (own > 0).mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(found.max, own.max(axis=0), atol=1e-4 * own.max())
    assert BRIDGE in names["gain"].nlargest(10).index
    values = [example.value for example in found[BRIDGE].examples]
    assert len(values) == 5 and values[0] > 4
    assert values == sorted(values, reverse=True)


def test_the_sweep_reads_what_it_holds(names: dict[str, Any]) -> None:
    strengths, read = names["strengths"], np.array(names["read"])
    assert len(read) == 50 and np.ptp(read) > 5
    assert np.corrcoef(strengths, read)[0, 1] > 0.99


def test_a_second_request_goes_on_as_one_request_with_spans(
    names: dict[str, Any],
) -> None:
    begun, ended = names["begun"].outputs[0], names["ended"].outputs[0]
    assert begun.stop_reason == f"sae:golden-gate:{names['SITE']}:188"
    n = len(begun.token_ids)
    assert 0 < n < 32
    spans = [SteeringSpan("prompt"), SteeringSpan("generated", 0, n)]
    clamp = SAEClampEntry(BRIDGE, "absolute", 12.0)
    spec = SAEClampSpec("golden-gate", [clamp], spans=spans)
    params = SteeringSamplingParams(
        max_tokens=n + len(ended.token_ids), temperature=0, sae_clamp_specs=[spec]
    )
    (one,) = names["llm"].generate(["The chef"], params, use_tqdm=False)
    assert list(one.outputs[0].token_ids) == [*begun.token_ids, *ended.token_ids]


def test_losses_and_divergences_are_those_of_hugging_face(
    names: dict[str, Any],
) -> None:
    decoder = names["sae"]["W_dec"]

    def held(x: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
        return x + (9.4 - f[:, BRIDGE, None]) * decoder[BRIDGE]

    def pure(x: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
        return f @ decoder + names["sae"]["b_dec"]

    edits: dict[str, Edit] = {
        "plain": lambda x, f: x,
        "reconstructed": pure,
        "bridge": held,
    }
    theirs = {
        name: [hugging_face(names, text, edit) for text in range(8)]
        for name, edit in edits.items()
    }
    loss, divergence = names["cross_entropy"], names["divergence"]
    for name in edits:
        for own, other in zip(names[name], theirs[name], strict=True):
            np.testing.assert_allclose(own, other, atol=2e-4)
        assert loss(names[name]) == pytest.approx(loss(theirs[name]), abs=1e-4)
        assert divergence(names["plain"], names[name]) == pytest.approx(
            divergence(theirs["plain"], theirs[name]), abs=1e-4
        )


def test_an_ablation_has_the_effect_that_hooks_have(names: dict[str, Any]) -> None:
    decoder, effect = names["sae"]["W_dec"], names["effect"]
    feature = max(effect, key=lambda one: effect[one])
    assert effect[feature] > 0.01

    def without(x: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
        return x - f[:, feature, None] * decoder[feature]

    ids = names["texts"][0].token_ids[1:]
    plain, ablated = (
        -hugging_face(names, 0, edit)[np.arange(len(ids)), ids].mean()
        for edit in (lambda x, f: x, without)
    )
    assert effect[feature] == pytest.approx(ablated - plain, abs=1e-4)


@torch.no_grad()
def greedy(names: dict[str, Any], ids: list[int], edits: dict[int, Edit]) -> list[int]:
    """The 16 tokens that Hugging Face's model writes, edited after these layers."""
    model = names["model"]
    handles = [
        model.model.layers[layer].register_forward_hook(
            lambda _module, _args, output, edit=edit: edit(output, output)
        )
        for layer, edit in edits.items()
    ]
    try:
        for _ in range(16):
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
        return ids[-16:]
    finally:
        for handle in handles:
            handle.remove()


def test_a_direction_is_added_and_taken_out_as_by_hooks(names: dict[str, Any]) -> None:
    v = names["direction"]
    unit = v / v.norm()

    def without(x: torch.Tensor, _f: torch.Tensor) -> torch.Tensor:
        return x - (x @ unit)[..., None] * unit

    hooks: dict[str, dict[int, Edit]] = {
        "plain": {},
        "with": {1: lambda x, _f: x + 2.5 * v},
        "without": {1: without},
        "without, at all layers": dict.fromkeys(range(4), without),
    }
    assert list(names["edits"]) == list(hooks)
    said = {}
    for output, (name, edits) in zip(names["outputs"], hooks.items(), strict=True):
        said[name] = own = list(output.outputs[0].token_ids)
        theirs = greedy(names, list(output.prompt_token_ids), edits)
        assert len(own) > 4 and own == theirs[: len(own)], name
    assert said["with"] != said["plain"]


def test_an_sae_of_ones_own_fits_as_it_did_in_training(names: dict[str, Any]) -> None:
    fit, fvu = names["fit"], names["fvu"]
    assert fvu < 0.5
    assert fit.fvu == pytest.approx(fvu, rel=0.05)
    assert 0 < fit.l0 <= names["k"]


@torch.no_grad()
def test_an_edge_is_the_effect_that_hooks_have(names: dict[str, Any]) -> None:
    decoder, mine = names["sae"]["W_dec"], names["tensors"]
    source = int(names["sources"][names["source"]])
    seen: list[torch.Tensor] = []

    def read(_module: object, _args: object, output: torch.Tensor) -> None:
        p = (output[0, 1:] @ mine["W_enc"].T + mine["b_enc"]).relu()
        values, indices = p.topk(names["k"])
        seen.append(torch.zeros_like(p).scatter(1, indices, values).sum(0))

    def without(x: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
        return x - f[:, source, None] * decoder[source]

    handle = names["model"].model.layers[2].register_forward_hook(read)
    try:
        hugging_face(names, 0, lambda x, f: x)
        hugging_face(names, 0, without)
    finally:
        handle.remove()
    own = names["edges"][names["source"]]
    np.testing.assert_allclose(own, (seen[0] - seen[1]).numpy(), atol=1e-2)
    assert np.abs(own).max() > 0.1
