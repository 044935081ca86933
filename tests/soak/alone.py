# SPDX-License-Identifier: Apache-2.0
"""References: what each request of the pool says alone, on an engine at rest."""

from __future__ import annotations

import math
import random
import re
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from soak.choices import Choices
from soak.pool import HOT, VERSIONS, Item, answers_of, drift
from soak.report import say
from steering_testing.engine import runner

from vllm import LLM
from vllm.entrypoints.steering import register_module, unregister_module
from vllm.outputs import CompletionOutput

# Sizes of the batches in which requests are repeated.
GROUPS = (4, 16, 64, 1 << 30)
# Requests of a batch in which selections are watched.
WATCHED = 32


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

    `left_out` counts them: `tokens`, the best first token is not clearly the best;
    `selection`, rounding decides which features are active; `batches`, they say
    something else in another batch. `shortened` requests end before the first token
    that is not clearly the best.
    """

    items: list[Item] = field(default_factory=list)
    shortened: int = 0
    left_out: Counter[str] = field(default_factory=Counter)


def clear_tokens(completion: CompletionOutput, margin: float) -> int:
    """How many tokens are better than the second best by more than the margin, before
    the first one that is not."""
    for at, step in enumerate(completion.logprobs or []):
        best, second = sorted((one.logprob for one in step.values()), reverse=True)[:2]
        if best - second <= margin:
            return at
    return len(completion.token_ids)


def ask_alone(llm: LLM, item: Item, margin: float) -> int:
    """Fill in the item's reference; how many of its tokens are clearly the best."""
    llm.reset_prefix_cache()
    prompt = {"prompt_token_ids": item.prompt}
    [output] = llm.generate([prompt], item.params(logprobs=2), use_tqdm=False)
    item.reference = answers_of(output)
    return min(clear_tokens(completion, margin) for completion in output.outputs)


def ask_what_is_clear(llm: LLM, item: Item, margin: float) -> bool:
    """Fill in the item's reference, and end the item before the first token that is
    not clearly the best; whether anything is left of it."""
    clear = ask_alone(llm, item, margin)
    if 0 < clear < item.max_tokens:
        item.max_tokens = clear
        # What it reads is shorter, too. No earlier token can change.
        assert ask_alone(llm, item, margin) == clear
    return clear > 0


def answer_alone(
    llm: LLM,
    pool: Iterable[Item],
    versions: dict[str, str],
    limits: Rounding,
    deadline: float = math.inf,
) -> Pool:
    """The items with a reference, less those whose answer rounding decides.

    Items that are not asked at the deadline (`time.monotonic`) are left out, too.
    """
    kept = Pool()
    choices = Choices(runner(llm).steering, limits.unit)
    for version in (None, *VERSIONS):
        if version is not None:
            register_module(llm, HOT, versions[version])
        asked = []
        for item in (item for item in pool if item.version == version):
            if time.monotonic() > deadline:
                kept.left_out["time"] += 1
                continue
            length = item.max_tokens
            if ask_what_is_clear(llm, item, limits.margin):
                kept.shortened += item.max_tokens < length
                asked.append(item)
            else:
                kept.left_out["tokens"] += 1
        found = decided(llm, asked, choices)
        kept.left_out["selection"] += len(asked) - len(found)
        once = len(found)
        for group in GROUPS if limits.repeats else ():
            found = repeatable(llm, found, limits.tolerance / 2, group)
        kept.left_out["batches"] += once - len(found)
        kept.items += found
        say(
            f"references: {len(kept.items)}, shortened: {kept.shortened}, "
            f"left out: {dict(kept.left_out)}"
        )
        if version is not None:
            unregister_module(llm, HOT)
    return kept


def decided(llm: LLM, items: list[Item], choices: Choices) -> list[Item]:
    """The items of which rounding decides no selection."""
    kept = []
    for start in range(0, len(items), WATCHED):
        part = items[start : start + WATCHED]
        llm.reset_prefix_cache()
        prompts = [{"prompt_token_ids": item.prompt} for item in part]
        sampling = [item.params() for item in part]
        with choices.watched():
            outputs = llm.generate(prompts, sampling, use_tqdm=False)
        undecided = {asked_as(req_id) for req_id in choices.undecided}
        pairs = zip(part, outputs, strict=True)
        kept += [item for item, output in pairs if output.request_id not in undecided]
    return kept


def asked_as(req_id: str) -> str:
    """The id that a request was given, from that of the engine's workers.

    The engine writes `PLACE_ID` for one of several samples, and adds a random end.
    """
    match = re.fullmatch(r"(?:\d+_)?(\w+?)(?:-\w+)?", req_id)
    assert match is not None, req_id
    return match[1]


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
