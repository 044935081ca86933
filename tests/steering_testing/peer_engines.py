# SPDX-License-Identifier: Apache-2.0
"""Engines of 16-bit models whose ranks share SAEs through their memory, beside copies
of the same SAEs."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from steering_testing import matrix, models
from steering_testing.engine import FULL, answer_of, params, sae_spec, save_sae
from steering_testing.oracle import Greedy
from steering_testing.reads import activations, assert_reads
from steering_testing.reference import DenseSAE, Edit, random_sae
from steering_testing.requests import Ask, Modules, prompt, specs, vector

from vllm import LLM
from vllm.entrypoints.steering import register_module, unregister_module
from vllm.model_executor.layers.steering_shards import tensor_at

FAMILY = "qwen3"  # its tiny model has four heads
WIDTH = 1024  # a multiple of 256 features for each of four ranks
KINDS = ("relu", "jumprelu", "topk")
COPIED = "-copied"
DENSE = "dense"  # its tokens have more non-zeros than a list holds
SPARE = {"layer": 1, "hook": "resid_post", "width": WIDTH, "sharding": "shard"}
# A TopK score moves by about this much in float16.
TIE = 4e-3


def halved(values: torch.Tensor) -> torch.Tensor:
    """The nearest float16, in the dtype of before."""
    return values.half().to(values.dtype)


@functools.cache
def model() -> Any:
    """Hugging Face's model in float32, with the weights of the float16 engine."""
    rounded = copy.deepcopy(models.build(FAMILY))
    with torch.no_grad():
        for weight in rounded.parameters():
            weight.copy_(halved(weight))
    return rounded


def sparse_sae(kind: str, seed: int, shift: float = -0.6) -> DenseSAE:
    """An SAE with the weights of a float16 engine, in which few features fire.

    Where a feature of a threshold SAE begins to fire, its output is nearly continuous:
    an activation that rounding has moved past the bar changes little.
    """
    activation = "relu" if kind == DENSE else kind
    sae = random_sae(WIDTH, models.HIDDEN, activation, seed)
    sae.W_enc, sae.W_dec = halved(sae.W_enc), halved(sae.W_dec)
    if kind != "topk":
        sae.b_enc = sae.b_enc + shift
    if sae.threshold is not None:
        sae.threshold = 0.1 * sae.threshold
    return sae


@functools.cache
def modules() -> Modules:
    """Those that ranks share, and a vector."""
    saes = {
        kind: dict.fromkeys(matrix.SITES, sparse_sae(kind, 11 + at))
        for at, kind in enumerate(KINDS)
    }
    dense = sparse_sae(DENSE, 17, shift=0.4)
    dense.W_dec = halved(dense.W_dec / 8)
    saes[DENSE] = {matrix.POST: dense}
    return Modules(saes, {"vector": {matrix.POST: vector(4, norm=8.0)}})


def save(root: Path, **options: Any) -> dict[str, Any]:
    """The engine's `modules`: each SAE twice, shared with these options, and copied."""
    found: dict[str, Any] = {}
    for name, path in modules().save(root).items():
        if path.endswith(".safetensors"):
            found[name] = path
            continue
        found[name] = {"path": path, "sharding": "shard", **options}
        found[name + COPIED] = {"path": path, "sharding": "replicate"}
    return found


def of_copies(asks: Sequence[Ask]) -> list[Ask]:
    """The same request to the copies."""
    return [
        replace(ask, module=ask.module + COPIED) if ask.tier != "additive" else ask
        for ask in asks
    ]


def requests() -> list[list[Ask]]:
    """Every tier, point, phase and activation; the first is plain."""
    clamps, post = matrix.CLAMPS, matrix.POST
    asked: list[list[Ask]] = [[]]
    for kind in KINDS:
        for phase in ("both", "prefill", "decode"):
            asked += [
                [Ask("full", kind, {site: clamps}, phase=phase)]
                for site in matrix.SITES
            ]
        asked.append([Ask("delta", kind, {post: clamps})])
    spans: list[tuple[str, int, int | None]] = [("prompt", -2, None)]
    return [
        *asked,
        [Ask("full", "relu")],
        [Ask("full", DENSE, {post: clamps})],
        [Ask("full", DENSE, {post: clamps}, phase="decode")],
        [Ask("full", "jumprelu", {post: clamps}, spans=spans)],
        [
            Ask("additive", "vector", scale=0.5),
            Ask("delta", "topk", {post: clamps}),
            Ask("full", "relu", {post: clamps[:1]}),
        ],
    ]


def rounds_of(worker: Any) -> int:
    """How many rounds of exchanges a worker's arena has counted; -1: it has none."""
    peers = worker.model_runner.steering.modules.backend.workspace.peers
    if peers is None:
        return -1
    arena = tensor_at(peers.addresses[peers.shard.rank], 4, worker.device)
    return int(arena.view(torch.int32))


def has_screened(worker: Any) -> bool:
    """Whether a worker's steps have been screened since it started."""
    screen = worker.model_runner.steering.modules.backend.workspace.screen
    return bool(screen.facts.any())


def answers(
    llm: LLM, prompts: Sequence[list[int]], asked: Sequence[list[Ask]], count: int
) -> list[Greedy]:
    """What a batch gets; each request's tokens and their log-probabilities."""
    sampling = [params(count, **specs(*asks)) for asks in asked]
    inputs = [{"prompt_token_ids": ids} for ids in prompts]
    outputs = llm.generate(inputs, sampling, use_tqdm=False)
    return [answer_of(output) for output in outputs]


def check_bits(
    llm: LLM, prompts: Sequence[list[int]], asked: Sequence[list[Ask]], count: int
) -> list[Greedy]:
    """Shared SAEs give the very log-probabilities of copies; what they give."""
    copied = [of_copies(asks) for asks in asked]
    expected = answers(llm, prompts, copied, count)
    again = answers(llm, prompts, copied, count)
    assert again == expected, "the engine itself does not repeat its bits"
    found = answers(llm, prompts, asked, count)
    for one, other, asks in zip(found, expected, asked, strict=True):
        assert one == other, f"{asks}: {one}, of copies {other}"
    return found


def check_oracle(
    found: Sequence[Greedy],
    prompts: Sequence[list[int]],
    asked: Sequence[list[Ask]],
    tolerance: float,
) -> None:
    """Each answer is Hugging Face's in float32, within 16-bit arithmetic."""
    for one, ids, asks in zip(found, prompts, asked, strict=True):
        edits = modules().edits(*asks)
        matrix.assert_near_of(model(), one, ids, edits, tolerance, f"{asks}")


def check_reading(llm: LLM, kind: str, tolerance: float) -> None:
    """A request reads a shared SAE and a copy while it is steered by the shared one."""
    ids, site = prompt(3, 9), (2, "post_attn")
    ask = Ask("full", "relu", {matrix.POST: matrix.CLAMPS})
    reads = [
        {"module_name": name, "sites": {"post_attn": [2]}, "top_k": 6}
        for name in (kind, kind + COPIED)
    ]
    wanted = params(5, sae_readout_specs=reads, **specs(ask))
    (output,) = llm.generate([{"prompt_token_ids": ids}], wanted, use_tqdm=False)
    answer = list(output.outputs[0].token_ids)
    edits, saes = modules().edits(ask), {site: modules().saes[kind][site]}
    acts = activations(model(), ids, answer, saes, edits)[site]
    for name in (kind, kind + COPIED):
        for record, part, first in (
            (output.prompt_sae_features, acts[: len(ids)], 0),
            (output.outputs[0].sae_features, acts[len(ids) :], len(ids)),
        ):
            assert_reads(
                record[name]["post_attn.2"],
                part,
                first,
                top_k=6,
                tolerance=tolerance,
                label=name,
                flips=16,
            )


def check_late_modules(llm: LLM, root: Path, tolerance: float) -> None:
    """A shared slot takes one module after another under captured graphs."""
    for kind in ("relu", "topk"):
        sae = sparse_sae(kind, 3)
        register_module(llm, "late", save_sae(root / kind, {matrix.POST: sae}))
        ids, sampling = prompt(7, 5), params(4, **{FULL: [sae_spec("late")]})
        (output,) = llm.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)
        edits = {matrix.POST: [Edit("full", sae)]}
        found = answer_of(output)
        matrix.assert_near_of(model(), found, ids, edits, tolerance, kind)
        unregister_module(llm, "late")
