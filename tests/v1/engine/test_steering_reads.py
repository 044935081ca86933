# SPDX-License-Identifier: Apache-2.0
"""The scheduler's and the front end's bookkeeping of what was read."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vllm.config.sae_features import merge
from vllm.config.sae_readout_specs import SiteRead, reads_to_json
from vllm.config.sae_readout_step import StepReadout
from vllm.config.steering import HookPoint
from vllm.v1.engine.steering_read_outputs import Readings
from vllm.v1.engine.steering_reads import (
    ReadCounts,
    RequestReads,
    StepRows,
    step_start,
)

READ = SiteRead("m", HookPoint.POST_BLOCK, 1, 1, (), ((5, 100.0),), "both")
PROMPT = 6


def rows_of(positions: list[int]) -> np.ndarray:
    """Rows that say their own position: value and feature `position`."""
    rows = np.zeros((len(positions), READ.width), dtype=np.int32)
    rows[:, 0] = rows[:, 1] = 1
    values = rows[:, 2:].view(np.float32)
    for at, position in enumerate(positions):
        rows[at, 3] = position
        values[at, 2] = float(position)
        values[at, 0] = 200.0 if position == FIRES[0] else 0.0
    return rows


FIRES = [10**6]


def step_of(positions: list[int]) -> StepRows:
    """A step of one request, whose tokens begin at the third row of the batch."""
    n = len(positions)
    return StepRows(StepReadout(["r"], [3], [n], [0], 3, {0: rows_of(positions)}))


class Walk:
    """A request as the scheduler and its worker would run it."""

    def __init__(self) -> None:
        FIRES[0] = 10**6
        self.counts: dict[str, ReadCounts] = {}
        self.reads = RequestReads((READ,), (0,), (99,), PROMPT, 0, self.counts)
        self.front = Readings({"sae_readout_specs": reads_to_json((READ,))}, PROMPT)
        self.num_tokens, self.computed = PROMPT, 0

    def step(self, tokens: int, drafts: int, accepted: int) -> None:
        """Run some known tokens, or all and drafts after them."""
        left = self.num_tokens - self.computed
        known = min(tokens, left)
        last = known == left
        drafts = drafts if last else 0
        accepted = min(accepted, drafts)
        positions = list(range(self.computed, self.computed + known + drafts))
        generated = 1 + accepted if last else 0
        start, count = step_start(
            self.num_tokens, len(positions), self.computed, drafts, generated
        )
        assert start == self.computed
        assert self.reads.take(step_of(positions), 3, start, count) is None
        self.num_tokens += generated
        self.computed += known + (accepted if last else 0)
        if generated and (payload := self.reads.payload()) is not None:
            self.front.add(payload)

    def preempt(self) -> None:
        self.computed = 0


STEPS = st.lists(
    st.tuples(st.integers(1, 9), st.integers(0, 3), st.integers(0, 3))
    | st.just("preempt"),
    max_size=25,
)


@given(steps=STEPS)
def test_every_position_arrives_once_whatever_the_schedule(steps: list) -> None:
    walk = Walk()
    for step in [*steps, (10**4, 0, 0)]:
        if step == "preempt":
            walk.preempt()
        else:
            walk.step(*step)
    generated = walk.num_tokens - PROMPT
    walk.front.finish(generated, fired=False)
    prompt = walk.front.take_prompt(delta=True)["m"]["post_block.1"]
    assert prompt.positions.tolist() == list(range(PROMPT))
    whole = [*prompt.positions.tolist()]
    output = walk.front.take_output(delta=False)
    if generated > 1:
        record = output["m"]["post_block.1"]
        whole += record.positions.tolist()
        assert record.values[:, 0].tolist() == record.positions.tolist()
    assert whole == list(range(walk.num_tokens - 1))
    assert walk.counts["m"].tokens == len(whole)
    assert walk.front.take_prompt(delta=True) == {}


def test_the_first_firing_generated_token_ends_the_request() -> None:
    walk = Walk()
    walk.step(PROMPT, 0, 0)
    FIRES[0] = PROMPT + 1
    step = step_of([6, 7, 8, 9])
    fired = walk.reads.take(step, 3, *step_start(walk.num_tokens, 4, PROMPT, 3, 4))
    assert fired is not None
    assert (fired.position, fired.reason) == (7, "sae:m:post_block.1:5")
    assert walk.counts["m"].stops == 1


def test_min_tokens_and_the_prompt_do_not_fire() -> None:
    for position, min_tokens in ((PROMPT - 1, 0), (PROMPT + 1, 3)):
        walk = Walk()
        walk.reads.min_tokens = min_tokens
        FIRES[0] = position
        step = step_of(list(range(PROMPT + 2)))
        assert walk.reads.take(step, 3, 0, PROMPT + 2) is None


def test_what_a_stop_cuts_off_has_no_entry() -> None:
    for fired, kept in ((False, [6]), (True, [6, 7])):
        walk = Walk()
        walk.step(PROMPT, 0, 0)
        walk.step(1, 3, 3)
        walk.front.finish(2, fired)
        record = walk.front.take_output(delta=True)["m"]["post_block.1"]
        assert record.positions.tolist() == kept


def test_deltas_join_to_the_whole() -> None:
    walk = Walk()
    parts = None
    for step in ((PROMPT, 0, 0), (1, 2, 1), (1, 0, 0), (1, 0, 0)):
        walk.step(*step)
        parts = merge(parts, walk.front.take_output(delta=True))
    assert parts is not None
    assert parts["m"]["post_block.1"].positions.tolist() == [6, 7, 8, 9]
    dense = parts["m"]["post_block.1"].to_dense()
    assert dense.shape == (4, 99) and dense[1, 7] == 7.0 and dense.sum() == 30.0
