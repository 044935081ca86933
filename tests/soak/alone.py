# SPDX-License-Identifier: Apache-2.0
"""References: what each request of the pool says alone, on an engine at rest."""

from __future__ import annotations

from collections.abc import Iterable

from soak.chaos import answer_of
from soak.pool import HOT, VERSIONS, Item

from vllm import LLM
from vllm.entrypoints.steering import register_module, unregister_module
from vllm.outputs import CompletionOutput


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
    llm: LLM, pool: Iterable[Item], versions: dict[str, str], margin: float
) -> list[Item]:
    """The items with a reference, less those whose tokens rounding may decide."""
    kept = []
    for version in (None, *VERSIONS):
        if version is not None:
            register_module(llm, HOT, versions[version])
        for item in pool:
            if item.version == version and ask_alone(llm, item) > margin:
                kept.append(item)
        if version is not None:
            unregister_module(llm, HOT)
    return kept


def drop_unrepeatable(llm: LLM, pool: list[Item], tolerance: float) -> list[Item]:
    """The items that say the same when all of them are asked at once, calmly.

    For arithmetic whose rounding depends on the shape of a batch: a feature whose
    pre-activation is at its threshold may be active in one shape and not in another.
    """
    llm.reset_prefix_cache()
    still = [item for item in pool if item.version is None]
    prompts = [{"prompt_token_ids": item.prompt} for item in still]
    outputs = llm.generate(prompts, [item.params() for item in still], use_tqdm=False)
    changed = set()
    for item, output in zip(still, outputs, strict=True):
        found = sorted(output.outputs, key=lambda completion: completion.index)
        for completion, right in zip(found, item.reference, strict=True):
            said = answer_of(completion)
            pairs = zip(said.scores, right.scores, strict=True)
            drifts = any(abs(score - alone) > tolerance for score, alone in pairs)
            if said.tokens != right.tokens or drifts:
                changed.add(id(item))
    return [item for item in pool if id(item) not in changed]
