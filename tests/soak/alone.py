# SPDX-License-Identifier: Apache-2.0
"""References: what each request of the pool says alone, on an engine at rest."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from soak.choices import Choices
from soak.pool import HOT, VERSIONS, Item, answers_of, drift
from steering_testing.engine import runner

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
        unit: unit round-off of matrix products, as of `choices.undecided`.
        repeats: whether a request must say in batches, to half the tolerance, what it
            says alone.
    """

    margin: float
    tolerance: float
    unit: float
    repeats: bool


@dataclass
class Pool:
    """Requests that have one right answer, and why the others have none.

    `left_out` counts them: `tokens`, the best token is not clearly the best;
    `selection`, rounding decides which features are active; `batches`, they say
    something else in another batch.
    """

    items: list[Item] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def smallest_gap(completion: CompletionOutput) -> float:
    """How much better the best token was than the second, at the closest step."""
    gaps = []
    for step in completion.logprobs or []:
        best, second = sorted((one.logprob for one in step.values()), reverse=True)[:2]
        gaps.append(best - second)
    return min(gaps)


def ask_alone(llm: LLM, item: Item, choices: Choices, margin: float) -> str | None:
    """Fill in the item's reference; why it has none."""
    llm.reset_prefix_cache()
    prompt = {"prompt_token_ids": item.prompt}
    with choices.watched():
        [output] = llm.generate([prompt], item.params(logprobs=2), use_tqdm=False)
    item.reference = answers_of(output)
    if min(map(smallest_gap, output.outputs)) <= margin:
        return "tokens"
    return "selection" if choices.undecided else None


def answer_alone(
    llm: LLM, pool: Iterable[Item], versions: dict[str, str], limits: Rounding
) -> Pool:
    """The items with a reference, less those whose answer rounding decides."""
    kept = Pool()
    steering = runner(llm).steering
    choices = Choices(list(steering.modules.sites.values()), steering.step, limits.unit)
    for version in (None, *VERSIONS):
        if version is not None:
            register_module(llm, HOT, versions[version])
        found = []
        for item in (item for item in pool if item.version == version):
            reason = ask_alone(llm, item, choices, limits.margin)
            if reason is None:
                found.append(item)
            else:
                kept.left_out[reason] += 1
        decided = len(found)
        for group in GROUPS if limits.repeats else ():
            found = repeatable(llm, found, limits.tolerance / 2, group)
        kept.left_out["batches"] += decided - len(found)
        kept.items += found
        if version is not None:
            unregister_module(llm, HOT)
    return kept


def repeatable(llm: LLM, items: list[Item], tolerance: float, group: int) -> list[Item]:
    """The items that say the same when asked calmly, `group` of them at once.

    For arithmetic whose rounding depends on the shape of a batch.
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
            answers = zip(answers_of(output), item.reference, strict=True)
            if all(drift(said, alone) <= tolerance for said, alone in answers):
                kept.append(item)
    return kept
