# SPDX-License-Identifier: Apache-2.0
"""Model Runner V2's mixin and seams on the runner's own objects, under a scheduler."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from steering_testing import models, runner_v2
from steering_testing.engine import (
    DELTA,
    FULL,
    engine,
    params,
    runner,
    sae_spec,
    save_sae,
)
from steering_testing.reference import Clamp, random_sae
from steering_testing.requests import Ask, prompt, specs, vector

from vllm import LLM
from vllm.config.sae_readout_specs import read_key
from vllm.config.sae_steering_parser import parse_steering_request
from vllm.config.sae_steering_specs import READOUT_KEY
from vllm.config.steering import Tier
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.gpu.input_batch import InputBatch

pytestmark = pytest.mark.engine

SITE, TOKENS = (1, "post_block"), 12
MOST_STEPS = 2000


def asked(at: int) -> dict[str, Any]:
    """One of several requests: each phase, all tiers, and plain ones."""
    clamp = [Clamp(at % 5, "absolute", 2.0)]
    phase = ("both", "prefill", "decode")[at % 3]
    spec = [sae_spec("m", {SITE: clamp}, phase)]
    own = Ask("additive", vector=vector(at % 3), site=SITE, phase=phase)
    kinds = [{}, {FULL: spec}, {DELTA: spec}, {FULL: spec, DELTA: spec}, specs(own)]
    read = {READOUT_KEY: [{"module_name": "m", "top_k": 2 + at % 2, "phase": phase}]}
    return {**kinds[at % 5], **(read if at % 4 < 2 else {})}


@pytest.fixture(scope="module")
def llm(model_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """An engine whose scheduler plans for runner V2; its own runner never runs."""
    sae = random_sae(96, models.HIDDEN, "jumprelu", 3)
    path = save_sae(tmp_path_factory.mktemp("sae") / "m", {SITE: sae})
    options = {
        "num_gpu_blocks_override": 9,
        "block_size": 32,
        "max_model_len": 128,
        "max_num_seqs": 6,
        "max_num_batched_tokens": 24,
        "async_scheduling": False,
    }
    steering = {"inline_vectors": {"post_block.1": 1}}
    with engine("llama", model_root, {"m": path}, steering, **options) as llm:
        core = llm.llm_engine.engine_core.engine_core
        core.scheduler.use_v2_model_runner = True
        yield llm


class Serving:
    """The scheduler and a V2 runner, step by step; every step's index is checked."""

    def __init__(self, llm: LLM):
        self.engine = llm.llm_engine
        self.scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        self.steering = runner(llm).steering
        model, config = runner(llm).get_model(), llm.llm_engine.vllm_config
        self.runner = runner_v2.make_runner(config, model, self.steering)
        self.asked: dict[str, tuple[int, dict[str, Any]]] = {}
        self.preempted = self.chunks = self.resumed = self.read_steps = 0
        self.idle_steps = 0

    def add(self, req_id: str, length: int, extra: dict[str, Any]) -> None:
        ids = prompt(hash(req_id) % 1000, length)
        sampling = params(TOKENS, **extra)
        found = self.engine.add_request(req_id, {"prompt_token_ids": ids}, sampling)
        self.asked[found] = (length, extra)

    def step(self) -> bool:
        """One step; false when nothing was left to do."""
        planned = self.scheduler.schedule()
        self.preempted += len(planned.preempted_req_ids or ())
        batch = runner_v2.prepare(self.runner, planned)
        live = {*self.scheduler.requests, *self.scheduler.finished_req_ids}
        self.steering.check_integrity(live)
        # Those that wait, preempted or not, hold no rows.
        assert set(self.steering.holding) <= set(self.runner.req_states.req_id_to_index)
        if batch is None:
            return bool(self.scheduler.requests)
        self.check_index(planned, batch)
        output = runner_v2.sampled(self.runner, batch, token=5)
        self.scheduler.update_from_output(planned, output)
        return True

    def check_index(self, planned: SchedulerOutput, batch: InputBatch) -> None:
        """Every token's rows hold what its request asks for at its position."""
        computed = {new.req_id: new.num_computed_tokens
                    for new in planned.scheduled_new_reqs}  # fmt: skip
        cached = planned.scheduled_cached_reqs
        computed |= zip(cached.req_ids, cached.num_computed_tokens, strict=True)
        token, is_used = 0, False
        for at, req_id in enumerate(batch.req_ids):
            length, extra = self.asked[req_id]
            request = parse_steering_request(extra, self.steering.config)
            count = planned.num_scheduled_tokens[req_id]
            self.chunks += computed[req_id] + count < length
            for position in range(computed[req_id], computed[req_id] + count):
                assert int(batch.positions[token]) == position
                phase = "prefill" if position < length else "decode"
                for tier in Tier:
                    key = request.row_key(tier, phase) if request else None
                    row = int(self.steering.step.index[tier, token])
                    manager = self.steering.managers[tier]
                    assert (manager.key_of(row) if row else None) == key, (
                        at, req_id, position, tier)  # fmt: skip
                    is_used |= key is not None
                row = int(self.steering.step.read_index[token])
                reader = self.steering.readout.manager
                key = read_key(request.reads, phase) if request else None
                assert (reader.key_of(row) if row else None) == key, (req_id, position)
                is_used |= key is not None
                token += 1
        assert self.steering.is_idle == (not is_used)
        self.idle_steps += not is_used
        assert not self.steering.step.index[:, token:].any()
        assert not self.steering.step.read_index[token:].any()
        self.check_readout(computed)

    def check_readout(self, computed: dict[str, int]) -> None:
        """What is sent says whose rows they are, and from which position."""
        found = self.runner.take_steering_readout()
        assert (found is not None) == bool(self.steering.step.read_index.any())
        if found is not None:
            self.read_steps += 1
            starts = found.num_computed.tolist()
            assert starts == [computed[req_id] for req_id in found.req_ids]
            ends = found.first_rows + found.num_tokens
            assert all(len(rows) >= ends.max() for rows in found.rows.values())

    def finish(self) -> None:
        """Run until nothing is left, and the runner has heard of it."""
        for _ in range(MOST_STEPS):
            if not self.step() and not self.scheduler.finished_req_ids:
                return
        raise AssertionError("the scheduler does not come to an end")


@pytest.fixture
def serving(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> Serving:
    runner_v2.use_plain_kernels(monkeypatch)
    llm.reset_prefix_cache()
    return Serving(llm)


def assert_all_returned(serving: Serving) -> None:
    assert serving.steering.holding == serving.steering.parked == []
    readers = serving.steering.readout.manager
    for manager in (*serving.steering.managers.values(), readers):
        assert manager.rows_in_use == 0
    assert serving.steering.modules.inline.in_use == 0
    assert serving.runner.req_states.num_reqs == 0


def test_every_token_has_its_requests_row_through_chunks_and_preemption(
    serving: Serving,
) -> None:
    for at in range(12):
        serving.add(f"r{at}", 20 + 7 * (at % 5), asked(at))
    serving.finish()
    assert serving.chunks > 0, "nothing was chunked"
    assert serving.preempted > 0, "nothing was preempted"
    assert serving.read_steps > 0, "nothing was read"
    assert_all_returned(serving)


def test_answer_tokens_of_a_preempted_request_stay_in_the_decode_phase(
    serving: Serving,
) -> None:
    """When it returns, its answer so far is computed as a prefill is."""
    spec = [sae_spec("m", {SITE: [Clamp(1, "absolute", 2.0)]}, "decode")]
    serving.add("back", 20, {FULL: spec})
    while (
        len(serving.scheduler.requests[next(iter(serving.asked))].output_token_ids) < 6
    ):
        serving.step()
    serving.scheduler.reset_prefix_cache(reset_running_requests=True)
    serving.step()
    [index] = serving.runner.req_states.req_id_to_index.values()
    states = serving.runner.req_states
    assert states.prefill_len.np[index] > states.prompt_len.np[index] == 20
    assert serving.idle_steps == 1, "of the prompt, before it was preempted"
    serving.finish()
    assert_all_returned(serving)


def test_an_aborted_request_gives_its_rows_back(serving: Serving) -> None:
    for at in range(1, 6):
        serving.add(f"a{at}", 20, asked(at))
    for _ in range(6):
        serving.step()
    assert serving.steering.holding
    serving.engine.abort_request([f"a{at}" for at in range(1, 6)])
    serving.finish()
    assert_all_returned(serving)


def test_a_random_storm_leaves_nothing_behind(serving: Serving) -> None:
    rng = random.Random(0)
    for at in range(60):
        serving.add(f"s{at}", rng.randint(2, 60), asked(rng.randrange(20)))
        for _ in range(rng.randint(0, 4)):
            serving.step()
        if rng.random() < 0.2:
            serving.engine.abort_request([f"s{rng.randrange(at + 1)}"])
        if rng.random() < 0.1:
            serving.scheduler.reset_prefix_cache(reset_running_requests=True)
    serving.finish()
    assert_all_returned(serving)


@pytest.mark.parametrize("verb", ["_dummy_run", "capture_model"])
def test_dummy_runs_and_capture_steer_nothing(serving: Serving, verb: str) -> None:
    serving.add("d", 20, asked(1))
    serving.step()
    assert serving.steering.step.index.any()
    # The stock body wants a GPU; the index is cleared before it begins.
    with suppress(AttributeError, TypeError):
        getattr(serving.runner, verb)(1)
    assert torch.count_nonzero(serving.steering.step.index) == 0
    serving.finish()


def test_a_request_that_is_never_forgotten_is_noticed(serving: Serving) -> None:
    serving.add("x", 8, asked(1))
    serving.step()
    serving.steering.park_request(next(iter(serving.asked)))
    serving.steering.check_integrity()
    with pytest.raises(AssertionError, match="finished requests are still known"):
        serving.steering.check_integrity(live=[])
    serving.steering.resume_request(next(iter(serving.asked)))
    serving.finish()
    assert_all_returned(serving)
