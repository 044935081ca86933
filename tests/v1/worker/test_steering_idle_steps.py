# SPDX-License-Identifier: Apache-2.0
"""Which steps replay a graph without steering: those in which no token needs it.

A CPU has no CUDA graphs. So the engine runs its steps as if it replayed them: an idle
step launches nothing at any site, and every other one launches all tiers and reading.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from safetensors.torch import save_file
from steering_testing import models
from steering_testing.engine import (
    DELTA,
    FULL,
    VECTORS,
    answer_of,
    engine,
    params,
    runner,
    sae_spec,
    save_sae,
)
from steering_testing.oracle import Greedy
from steering_testing.reference import Clamp, random_sae
from steering_testing.requests import Ask, prompt, specs, vector
from steering_testing.specs import admitted

from vllm import LLM
from vllm.config.sae_steering_specs import READOUT_KEY
from vllm.config.steering_environment import IDLE_GRAPHS_ENV
from vllm.model_executor.layers import (
    steering_capture,
    steering_reference,
    steering_reference_backend,
)
from vllm.v1.worker.steering_index import BatchView

pytestmark = pytest.mark.engine

SITE, TOKENS = (1, "post_block"), 6
CHUNK = 24  # tokens of a step
CLAMPS = {SITE: [Clamp(5, "absolute", 4.0)]}
# Whether a request's token at (position, prompt length) is edited or read.
Uses = Callable[[int, int], bool]


def always(at: int, length: int) -> bool:
    return True


def never(at: int, length: int) -> bool:
    return False


def prefill(at: int, length: int) -> bool:
    return at < length


def decode(at: int, length: int) -> bool:
    return at >= length


def reads(phase: str) -> dict[str, Any]:
    return {READOUT_KEY: [{"module_name": "m", "top_k": 2, "phase": phase}]}


def late(start: int, stop: int) -> dict[str, Any]:
    spec = sae_spec("m", CLAMPS, spans=[("prompt", start, stop)])
    return {FULL: [spec]}


INLINE = Ask("additive", vector=vector(2), site=SITE, phase="decode")
KINDS: dict[str, tuple[dict[str, Any], Uses]] = {
    "plain": ({}, never),
    "full": ({FULL: [sae_spec("m", CLAMPS)]}, always),
    "delta of the prompt": ({DELTA: [sae_spec("m", CLAMPS, "prefill")]}, prefill),
    "a vector": ({VECTORS: [{"module_name": "v", "scale": 2.0}]}, always),
    "an own vector, decoding": (specs(INLINE), decode),
    "a preset": ({"steering_preset": "bold"}, decode),
    "reads": (reads("both"), always),
    "reads the prompt": (reads("prefill"), prefill),
    "reads while it decodes": (reads("decode"), decode),
    "a later chunk": (late(30, 33), lambda at, length: 30 <= at < 33),
    "edits the prompt, reads on": (
        {FULL: [sae_spec("m", CLAMPS, "prefill")], **reads("decode")},
        always,
    ),
}
# The others are in the mixed batch, which always runs.
QUICK = ("plain", "an own vector, decoding", "reads while it decodes")


@pytest.fixture(scope="module")
def llm(model_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """An engine with few tokens a step, and a cache too small for a batch."""
    root = tmp_path_factory.mktemp("idle")
    sae = random_sae(96, models.HIDDEN, "jumprelu", 3)
    save_file({f"layers.1.{SITE[1]}": vector(1)}, root / "v.safetensors")
    modules = {
        "m": save_sae(root / "m", {SITE: sae}),
        "v": str(root / "v.safetensors"),
    }
    steering = {
        "inline_vectors": {"post_block.1": 1},
        "presets": {"bold": {DELTA: [sae_spec("m", CLAMPS, "decode")]}},
    }
    options = {
        "num_gpu_blocks_override": 5,
        "block_size": 32,
        "max_model_len": 128,
        "max_num_seqs": 6,
        "max_num_batched_tokens": CHUNK,
        "enable_prefix_caching": False,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(IDLE_GRAPHS_ENV, "1")
        with engine("llama", model_root, modules, steering, **options) as llm:
            yield llm


@dataclass(frozen=True)
class Step:
    """What a step had to do, what was decided, and how often a site was launched."""

    used: bool
    idle: bool
    launches: int


@contextmanager
def as_if_captured(llm: LLM, uses: dict[int, Uses]) -> Iterator[list[Step]]:
    """Runs steps as replays of graphs; `uses` are the requests', by prompt length."""
    worker = runner(llm)
    steering, found = worker.steering, []
    prepare, forward = steering.prepare_step, worker._model_forward
    counts = {"launches": 0}
    used = {"now": False}

    def prepare_step(view: BatchView) -> None:
        prepare(view)
        rows = zip(view.num_computed, view.num_scheduled, view.prompt_len, strict=True)
        used["now"] = any(
            uses[int(length)](at, int(length))
            for start, count, length in rows
            for at in range(int(start), int(start + count))
        )

    def model_forward(*args: Any, **kwargs: Any) -> Any:
        steering.step.idle_graph = steering.idle_graphs.chosen
        before = counts["launches"]
        try:
            return forward(*args, **kwargs)
        finally:
            now = counts["launches"] - before
            found.append(Step(used["now"], steering.step.idle_graph, now))
            steering.step.idle_graph = False

    def counted(stock: Any) -> Any:
        def launch(*args: Any) -> None:
            counts["launches"] += 1
            stock(*args)

        return launch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steering, "prepare_step", prepare_step)
        patch.setattr(worker, "_model_forward", model_forward)
        patch.setattr(steering_capture, "is_captured", lambda device: True)
        for module, name in (
            (steering_reference, "full_reconstruction"),
            (steering_reference, "sae_clamp"),
            (steering_reference, "steering_vectors"),
            (steering_reference_backend, "read_features"),
        ):
            patch.setattr(module, name, counted(getattr(module, name)))
        yield found


def length_of(at: int) -> int:
    """Prompts of different lengths, by which steps know their requests."""
    return 40 + 3 * at


def ask(llm: LLM, kinds: list[str]) -> list[tuple[Greedy, Any]]:
    """A batch of requests of these kinds: tokens, and what was read."""
    inputs = [
        {"prompt_token_ids": prompt(40 + at, length_of(at))} for at in range(len(kinds))
    ]
    sampling = [params(TOKENS, **KINDS[kind][0]) for kind in kinds]
    outputs = llm.generate(inputs, sampling, use_tqdm=False)
    return [(answer_of(out), reading(out)) for out in outputs]


def reading(output: Any) -> list[Any]:
    """What a request has read, of its prompt and of its tokens, as lists."""
    said = (output.prompt_sae_features, output.outputs[0].sae_features)
    return [
        [site.features.tolist(), site.values.tolist(), site.positions.tolist()]
        for sites in said
        for at in (sites or {}).values()
        for site in at.values()
    ]


def check(llm: LLM, kinds: list[str]) -> list[Step]:
    """The steps of a batch, each of which is as idle as it may be."""
    plain = ask(llm, kinds)
    uses = {length_of(at): KINDS[kind][1] for at, kind in enumerate(kinds)}
    with as_if_captured(llm, uses) as steps:
        found = ask(llm, kinds)
    assert found == plain
    # Full, delta, reading and the vectors' launch.
    assert steps == [Step(s.used, not s.used, 4 * s.used) for s in steps]
    return steps


@pytest.mark.parametrize(
    "kind",
    [
        kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow)
        for kind in KINDS
    ],
)
def test_a_step_is_idle_where_no_token_needs_steering(llm: LLM, kind: str) -> None:
    steps = check(llm, ["plain", kind])
    # The plain request's first chunk comes before any token of the other one.
    expected = {True} if kind == "plain" else {True, False}
    assert {step.idle for step in steps} == expected


def test_a_prompt_of_which_only_a_later_chunk_is_steered(llm: LLM) -> None:
    steps = check(llm, ["a later chunk"])
    assert [step.idle for step in steps] == [True, False, *[True] * (len(steps) - 2)]


def test_preempted_requests_come_back_into_busy_steps(llm: LLM) -> None:
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    with pytest.MonkeyPatch.context() as patch:
        preempt = Mock(wraps=scheduler._preempt_request)
        patch.setattr(scheduler, "_preempt_request", preempt)
        steps = check(llm, [*list(KINDS)[:7], "plain", *list(KINDS)[7:]])
    assert preempt.call_count > 1
    assert {step.idle for step in steps} == {True, False}


def test_dummy_runs_are_idle_also_among_steered_requests(llm: LLM) -> None:
    """A rank of a data-parallel group has one when it has no request."""
    steering = runner(llm).steering
    ask(llm, ["full"])
    assert not steering.is_idle  # as of the last step
    runner(llm).clear_steering_step()
    assert steering.is_idle


def test_a_request_that_this_rank_cannot_follow_keeps_its_steps_busy(llm: LLM) -> None:
    """Other ranks of its group may steer it, and exchange with this one."""
    steering = runner(llm).steering
    extra = admitted(KINDS["full"][0], steering.config, 30)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steering, "config", replace(steering.config, modules={}))
        steering.add_request("lost", params(3, **extra))
    runner(llm).clear_steering_step()
    assert not steering.is_idle
    steering.remove_request("lost")
    assert steering.is_idle


def test_only_1_turns_the_option_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(IDLE_GRAPHS_ENV, raising=False)
    assert not steering_capture.idle_graphs_are_on()
    monkeypatch.setenv(IDLE_GRAPHS_ENV, "0")
    assert not steering_capture.idle_graphs_are_on()
