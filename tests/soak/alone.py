# SPDX-License-Identifier: Apache-2.0
"""References: what each request of the pool says alone, on an engine at rest."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass

from soak.pool import HOT, VERSIONS, Item, answer_of, drift

from vllm import LLM
from vllm.entrypoints.steering import register_module, unregister_module
from vllm.outputs import CompletionOutput

# Sizes of the batches in which requests are repeated.
GROUPS = (4, 16, 64, 1 << 30)


@dataclass
class Rounding:
    """What arithmetic that depends on a batch's shape may change.

    Attributes:
        margin: how much better a reference's tokens are than the second best.
        tolerance: largest difference of a log-probability.
        repeats: whether a request must say in batches, to half the tolerance, what it
            says alone.
    """

    margin: float
    tolerance: float
    repeats: bool


def smallest_gap(completion: CompletionOutput) -> float:
    """How much better the best token was than the second, at the closest step."""
    gaps = []
    for step in completion.logprobs or []:
        best, second = sorted((one.logprob for one in step.values()), reverse=True)[:2]
        gaps.append(best - second)
    return min(gaps)


def ask_alone(llm: LLM, item: Item) -> float:
    """Fill in the item's reference; the gap that decides its tokens."""
    llm.reset_prefix_cache()
    prompt = {"prompt_token_ids": item.prompt}
    [output] = llm.generate([prompt], item.params(logprobs=2), use_tqdm=False)
    completions = sorted(output.outputs, key=lambda completion: completion.index)
    item.reference = [answer_of(completion) for completion in completions]
    return min(map(smallest_gap, completions))


def answer_alone(
    llm: LLM, pool: Iterable[Item], versions: dict[str, str], limits: Rounding
) -> list[Item]:
    """The items with a reference, less those whose answer rounding decides."""
    kept = []
    for version in (None, *VERSIONS):
        if version is not None:
            register_module(llm, HOT, versions[version])
        found = [
            item
            for item in pool
            if item.version == version and ask_alone(llm, item) > limits.margin
        ]
        for group in GROUPS if limits.repeats else ():
            found = repeatable(llm, found, limits.tolerance / 2, group)
        kept += found
        if version is not None:
            unregister_module(llm, HOT)
    return kept


def repeatable(llm: LLM, items: list[Item], tolerance: float, group: int) -> list[Item]:
    """The items that say the same when asked calmly, `group` of them at once.

    For arithmetic whose rounding depends on the shape of a batch: a feature whose
    pre-activation is at its threshold may be active in one shape and not in another.
    """
    order = random.Random(group).sample(items, len(items))
    kept = []
    for start in range(0, len(order), group):
        llm.reset_prefix_cache()
        part = order[start : start + group]
        prompts = [{"prompt_token_ids": item.prompt} for item in part]
        sampling = [item.params() for item in part]
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        for item, output in zip(part, outputs, strict=True):
            found = sorted(output.outputs, key=lambda completion: completion.index)
            answers = zip(map(answer_of, found), item.reference, strict=True)
            if all(drift(said, alone) <= tolerance for said, alone in answers):
                kept.append(item)
    return kept
