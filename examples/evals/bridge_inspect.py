# SPDX-License-Identifier: Apache-2.0
"""The questions of `bridge.yaml` as a task of Inspect."""

from __future__ import annotations

import re
from pathlib import Path

from inspect_ai import Task, task
from inspect_ai.dataset import FieldSpec, json_dataset
from inspect_ai.model import GenerateConfig
from inspect_ai.scorer import Score, Scorer, Target, accuracy, scorer, stderr
from inspect_ai.solver import TaskState, generate

PROMPTS = Path(__file__).with_name("prompts.jsonl")


@scorer(metrics=[accuracy(), stderr()])
def bridge() -> Scorer:
    """1 where the answer speaks of the bridge."""

    async def score(state: TaskState, target: Target) -> Score:
        found = re.search("bridge|golden|suspension", state.output.completion, re.I)
        return Score(value=float(found is not None))

    return score


@task
def speaks_of_the_bridge() -> Task:
    """Questions that have nothing to do with bridges."""
    return Task(
        dataset=json_dataset(str(PROMPTS), FieldSpec(input="prompt")),
        solver=generate(),
        scorer=bridge(),
        config=GenerateConfig(max_tokens=24, temperature=0),
    )
