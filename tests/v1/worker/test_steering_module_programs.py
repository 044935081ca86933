# SPDX-License-Identifier: Apache-2.0
"""Random programs of requests, aborts and changes of modules, on an engine that makes
slots as it needs them: every answer is that of its module alone."""

from __future__ import annotations

import functools
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from steering_testing import models, oracle
from steering_testing.engine import DELTA, FULL, engine, params, runner
from steering_testing.hot_modules import (
    BLOCK,
    FAMILY,
    IDS,
    KINDS,
    SITE,
    SPARE,
    TOKENS,
    expected,
    leave_only_the_first,
    steered,
)
from steering_testing.reads import activations, assert_reads

from vllm import LLM
from vllm.entrypoints.steering import (
    SteeringModuleError,
    replace_module,
    unregister_module,
)
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

pytestmark = [pytest.mark.engine, pytest.mark.slow]

SECONDS = 30.0
NAMES = ("a", "b", "c", "d")
READ = "sae_readout_specs"
TOP_K = 4


@functools.cache
def answer(kind: str, field: str) -> list[int]:
    """The tokens of a module of this kind, alone on Hugging Face."""
    if field == READ:
        return oracle.greedy(models.build(FAMILY), IDS, {}, TOKENS).tokens
    return expected(KINDS[kind], "full" if field == FULL else "delta").tokens


@functools.cache
def activations_of(kind: str) -> Any:
    """What the tokens of the prompt and of the plain answer activate."""
    model = models.build(FAMILY)
    return activations(model, IDS, answer(kind, READ), {SITE: KINDS[kind]})[SITE]


class Program:
    """One engine under random operations.

    Attributes:
        kinds: of the modules that are there, by name.
        running: the kind of module and the field of each request that runs.
        done: how often each operation was done.
    """

    def __init__(self, llm: LLM, paths: dict[str, str], seed: int):
        self.llm = llm
        self.paths = paths
        self.rng = random.Random(seed)
        self.kinds = {"first": "other"}
        self.running: dict[str, tuple[str, str]] = {}
        self.done: Counter[str] = Counter()

    def run(self, seconds: float) -> None:
        operations = [self.ask, self.ask, self.change, self.remove, self.abort]
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.rng.choice(operations)()
            for _ in range(self.rng.randrange(6)):
                self.step()
        while self.running:
            self.step()

    def ask(self) -> None:
        name = self.rng.choice(list(self.kinds))
        if self.kinds[name] == "vector":
            return
        field = self.rng.choice((FULL, DELTA, READ))
        if field == READ:
            spec = {"module_name": name, "top_k": TOP_K}
            asked: SamplingParams = params(TOKENS, **{READ: [spec]})
        else:
            asked = steered(name, field)
        asked.output_kind = RequestOutputKind.FINAL_ONLY
        self.done["ask"] += 1
        request_id = f"r{self.done['ask']}"
        prompt = {"prompt_token_ids": IDS}
        self.llm.llm_engine.add_request(request_id, prompt, asked)
        self.running[request_id] = self.kinds[name], field

    def step(self) -> None:
        for output in self.llm.llm_engine.step():
            self.check(output)

    def check(self, output: RequestOutput) -> None:
        kind, field = self.running.pop(output.request_id)
        sample = output.outputs[0]
        wanted = answer(kind, field)
        assert list(sample.token_ids) == wanted, (kind, field)
        if field == READ:
            seen, n = activations_of(kind), len(IDS)
            site = f"{SITE[1]}.{SITE[0]}"
            (prompt,) = output.prompt_sae_features.values()
            (own,) = sample.sae_features.values()
            assert_reads(prompt[site], seen[:n], 0, top_k=TOP_K)
            assert_reads(own[site], seen[n:], n, top_k=TOP_K)
        self.done[f"finished {field}"] += 1

    def change(self) -> None:
        name, kind = self.rng.choice(NAMES), self.rng.choice(list(self.paths))
        try:
            replace_module(self.llm, name, self.paths[kind])
        except SteeringModuleError as error:
            text = str(error)
            assert "in use" in text or (kind == "vector" and "no free slot" in text)
            self.done["change refused"] += 1
            return
        self.kinds[name] = kind
        self.done["change"] += 1

    def remove(self) -> None:
        name = self.rng.choice(NAMES)
        if name not in self.kinds:
            return
        try:
            unregister_module(self.llm, name)
        except SteeringModuleError as error:
            assert "in use" in str(error)
            self.done["removal refused"] += 1
            return
        del self.kinds[name]
        self.done["removal"] += 1

    def abort(self) -> None:
        if self.running:
            request_id = self.rng.choice(list(self.running))
            del self.running[request_id]
            self.llm.llm_engine.abort_request([request_id])
            self.done["abort"] += 1


@pytest.mark.parametrize("spare", [[], SPARE], ids=["none", "spare"])
def test_any_program_leaves_every_answer_as_it_is(
    model_root: Path, paths: dict[str, str], spare: list[Any]
) -> None:
    # Small chunks of prompts, and a cache in which not all requests have room.
    options = {
        "max_num_batched_tokens": 32,
        "block_size": BLOCK,
        "num_gpu_blocks_override": 10,
    }
    modules = {"first": paths["other"]}
    with engine(FAMILY, model_root, modules, {"spare": spare}, **options) as llm:
        program = Program(llm, paths, seed=len(spare))
        program.run(SECONDS)
        runner(llm).steering.check_integrity()
        leave_only_the_first(llm)
        done = program.done
        least = ("change", "removal", "abort", f"finished {FULL}", f"finished {READ}")
        assert all(done[what] > 5 for what in least), done
