# SPDX-License-Identifier: Apache-2.0
"""The scheduler's and the front end's bookkeeping of what was read."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from steering_testing.read_rows import PROMPT, READ, SLOT, request_of, rows_of

from vllm.config.sae_features import NOT_READ, ReadFeatures, merge, merge_all
from vllm.config.sae_readout_specs import reads_to_json
from vllm.config.sae_readout_step import StepReadout, StepRows
from vllm.plugins.steering.outputs import ANSWER, FeaturesField
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.engine.steering_read_log import LogReader, ReadLog
from vllm.v1.engine.steering_read_outputs import (
    MANY_CHUNKS,
    PendingFeatures,
    Readings,
)
from vllm.v1.engine.steering_reads import (
    PAYLOAD_KEY,
    Fired,
    StepReads,
    step_start,
)

# Few, so that the log is emptied often.
KEPT_STEPS = 64


class Walk:
    """Requests as their scheduler, worker and front end would run them."""

    def __init__(self, names: str = "r") -> None:
        self.reads, self.log = StepReads(), ReadLog(KEPT_STEPS)
        self.requests = {name: request_of(name) for name in names}
        specs = {"sae_readout_specs": reads_to_json((READ,))}
        self.fronts = {
            name: Readings(specs, PROMPT, LogReader(self.log, name)) for name in names
        }
        self.num_tokens = dict.fromkeys(names, PROMPT)
        self.computed = dict.fromkeys(names, 0)
        self.fires: int | None = None
        self.fired: dict[str, Fired] = {}

    def step(self, *tokens: tuple[str, int, int, int]) -> None:
        """For each request, run some known tokens, or all and drafts after them."""
        rows, firsts, own, computed, spans = [], [], [], [], []
        outputs = []
        for name, wanted, drafts, accepted in tokens:
            left = self.num_tokens[name] - self.computed[name]
            known = min(wanted, left)
            last = known == left
            drafts = drafts if last else 0
            accepted = min(accepted, drafts)
            at = self.computed[name]
            firsts.append(sum(own) + 2)  # Two tokens before them read nothing.
            own.append(known + drafts)
            computed.append(at)
            rows.append(rows_of(list(range(at, at + known + drafts)), self.fires))
            generated = 1 + accepted if last else 0
            spans.append(
                step_start(self.num_tokens[name], own[-1], at, drafts, generated)
            )
            assert spans[-1][0] == at
            self.num_tokens[name] += generated
            self.computed[name] += known + (accepted if last else 0)
            if generated:
                outputs.append(EngineCoreOutput(name, [0] * generated))
        before = np.full((2, READ.width), NOT_READ, dtype=np.int32)
        step = StepReadout(
            [name for name, *_ in tokens],
            np.array(firsts),
            np.array(own),
            np.array(computed),
            {SLOT: np.concatenate([before, *rows])},
        )
        starts, counts = np.array(spans).T
        self.fired = self.reads.take(step, starts, counts, self.requests)
        of_client = EngineCoreOutputs(outputs=outputs)
        self.reads.attach({0: of_client})
        if outputs:
            params = of_client.outputs[0].ec_transfer_params
            assert params is not None
            for wire in params[PAYLOAD_KEY]:
                self.log.add(StepRows.from_wire(wire))

    def advance(self, name: str = "r", fired: bool = False) -> Readings:
        self.fronts[name].advance(self.num_tokens[name] - PROMPT, fired)
        return self.fronts[name]


ONE = st.tuples(st.integers(1, 9), st.integers(0, 3), st.integers(0, 3))
STEPS = st.lists(
    st.tuples(st.sampled_from(["ab", "a", "b", "ba"]), ONE, ONE)
    | st.sampled_from(["preempt a", "preempt b", "deliver a", "decode both"]),
    max_size=25,
)


@given(steps=STEPS)
def test_every_position_arrives_once_whatever_the_schedule(steps: list) -> None:
    walk = Walk("ab")
    early: dict = {}
    for step in [*steps, ("ab", (10**4, 0, 0), (10**4, 0, 0))]:
        if step == "decode both":
            for _ in range(KEPT_STEPS // 2 + 1):
                walk.step(("a", 1, 0, 0), ("b", 1, 0, 0))
        elif step == "deliver a":
            if walk.num_tokens["a"] > PROMPT:
                walk.advance("a")
            early = merge(early, walk.fronts["a"].take_output(delta=True).make()) or {}
        elif isinstance(step, str):
            walk.computed[step[-1]] = 0
        else:
            names, *tokens = step
            walk.step(*((n, *t) for n, t in zip(names, tokens, strict=False)))
    for name in "ab":
        front = walk.advance(name)
        prompt = front.take_prompt(delta=True).make()["m"]["post_block.1"]
        assert prompt.positions.tolist() == list(range(PROMPT))
        whole = prompt.positions.tolist()
        output = front.take_output(delta=False).make()
        if name == "a":
            output = merge(early, output) or {}
        if output:
            record = output["m"]["post_block.1"]
            whole += record.positions.tolist()
            assert record.values[:, 0].tolist() == record.positions.tolist()
        assert whole == list(range(walk.num_tokens[name] - 1))
        assert front.take_prompt(delta=True).make() == {}
    # Tokens that were computed twice, and rejected drafts, are counted too.
    total = sum(walk.num_tokens.values()) - 2
    assert walk.reads.counts["m"].tokens >= total


def test_an_output_made_while_a_preempted_request_catches_up_lacks_nothing() -> None:
    walk = Walk("ab")
    for _ in range(4):
        walk.step(("a", PROMPT, 0, 0), ("b", PROMPT, 0, 0))
    walk.computed["a"] = 0
    walk.step(("a", 2, 0, 0), ("b", 1, 0, 0))
    front = walk.advance("a")
    read = front.take_prompt(delta=True).make()["m"]["post_block.1"].positions.tolist()
    read += (
        front.take_output(delta=False).make()["m"]["post_block.1"].positions.tolist()
    )
    assert read == list(range(walk.num_tokens["a"] - 1))


def test_recomputed_tokens_replace_what_no_token_has_confirmed() -> None:
    walk = Walk()
    walk.step(("r", PROMPT, 0, 0))
    walk.step(("r", 1, 0, 0))
    # The output of a step is dropped: the token is sampled again after the prompt.
    walk.num_tokens["r"], walk.computed["r"] = PROMPT + 1, 0
    walk.fires = PROMPT
    walk.step(("r", PROMPT + 1, 0, 0))
    record = walk.advance().take_output(delta=True).make()["m"]["post_block.1"]
    assert record.positions.tolist() == [PROMPT]
    read = LogReader(walk.log, "late")
    read.pull()
    assert read.chunks == []


def test_a_long_request_keeps_its_own_rows_only() -> None:
    walk = Walk("ab")
    for _ in range(3 * KEPT_STEPS):
        walk.step(("a", PROMPT, 0, 0), ("b", PROMPT, 0, 0))
    assert sum(len(one.steps) for one in walk.log.segments) < KEPT_STEPS
    del walk.fronts["b"]
    assert set(walk.log.readers) == {"a"}
    chunks = walk.fronts["a"]._reader.chunks
    assert sum(chunk.count for chunk in chunks) >= 2 * KEPT_STEPS
    assert all(rows is not None and rows.base is None or len(rows) == chunk.count
               for chunk in chunks for rows in chunk.rows)  # fmt: skip
    record = walk.advance("a").take_output(delta=True).make()["m"]["post_block.1"]
    last = PROMPT + 3 * KEPT_STEPS - 1
    assert record.positions.tolist() == list(range(PROMPT, last))


@pytest.mark.parametrize("drafts", [0, 3])
def test_the_first_firing_generated_token_ends_the_request(drafts: int) -> None:
    walk = Walk("ab")
    walk.step(("a", PROMPT, 0, 0), ("b", PROMPT, 0, 0))
    assert walk.fired == {}
    walk.step(("a", 1, drafts, 1), ("b", 1, 0, 0))
    assert walk.fired == {}
    walk.fires = walk.computed["a"] + (1 if drafts else 0)
    walk.step(("a", 1, drafts, drafts), ("b", 1, 0, 0))
    reason = "sae:m:post_block.1:5"
    assert walk.fired["a"] == Fired(walk.fires, reason, "m")
    assert ("b" in walk.fired) == (not drafts)
    walk.reads.stopped(walk.fired["a"])
    assert walk.reads.counts["m"].stops == 1


def test_min_tokens_and_the_prompt_do_not_fire() -> None:
    for position, min_tokens in ((PROMPT - 1, 0), (PROMPT + 1, 3)):
        walk = Walk()
        walk.requests["r"] = request_of("r", min_tokens)
        walk.fires = position
        walk.step(("r", PROMPT, 0, 0))
        assert walk.fired == {}
        for _ in range(2):
            walk.step(("r", 1, 0, 0))
            assert walk.fired == {}
    walk.fires = PROMPT + 2
    walk.step(("r", 1, 0, 0))
    assert walk.fired["r"].position == PROMPT + 2


def test_a_step_without_the_watched_feature_does_not_fire() -> None:
    walk = Walk()
    walk.step(("r", PROMPT, 0, 0))
    narrow = np.full((1, 2), NOT_READ, dtype=np.int32)
    at = np.array([PROMPT])
    step = StepReadout(["r"], np.array([0]), np.array([1]), at, {SLOT: narrow})
    assert walk.reads.take(step, at, np.array([1]), walk.requests) == {}


def test_what_a_stop_cuts_off_has_no_entry() -> None:
    for fired, kept in ((False, [6]), (True, [6, 7])):
        walk = Walk()
        walk.step(("r", PROMPT, 0, 0))
        walk.step(("r", 1, 3, 3))
        walk.fronts["r"].advance(2, fired)
        record = walk.fronts["r"].take_output(delta=True).make()["m"]["post_block.1"]
        assert record.positions.tolist() == kept


def test_deltas_join_to_the_whole() -> None:
    walk = Walk()
    parts = None
    for step in ((PROMPT, 0, 0), (1, 2, 1), (1, 0, 0), (1, 0, 0)):
        walk.step(("r", *step))
        parts = merge(parts, walk.advance().take_output(delta=True).make())
    assert parts is not None
    assert parts["m"]["post_block.1"].positions.tolist() == [6, 7, 8, 9]
    dense = parts["m"]["post_block.1"].to_dense()
    assert dense.shape == (4, 99) and dense[1, 7] == 7.0 and dense.sum() == 30.0


class Output:
    sae_features = FeaturesField("sae_features")


def test_records_are_made_when_they_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    walk = Walk()
    for _ in range(3):
        walk.step(("r", PROMPT, 0, 0))
    made: list[int] = []
    stock = PendingFeatures.make

    def make(self: PendingFeatures) -> ReadFeatures:
        made.append(1)
        return stock(self)

    monkeypatch.setattr(PendingFeatures, "make", make)
    output = Output()
    assert output.sae_features is None and Output.sae_features is None
    output.sae_features = walk.advance().take_output(delta=False)
    sent = pickle.loads(pickle.dumps(output))
    assert made == []
    for own in (output, sent, output):
        record = own.sae_features["m"]["post_block.1"]
        assert record.positions.tolist() == [PROMPT, PROMPT + 1]
    assert len(made) == 2


class Sample:
    """A sample of a streamed prompt, as `RequestOutput` has it."""

    def __init__(self, index: int, features: object):
        self.index = index
        ANSWER.__set__(self, features)  # type: ignore[arg-type]


def test_outputs_that_wait_for_a_slow_client_are_joined_when_it_asks() -> None:
    """The loop that joins them serves all clients, so a token costs it a constant."""
    walk = Walk()
    waiting = None
    parts = []
    for _ in range(3 * MANY_CHUNKS):
        walk.step(("r", PROMPT, 0, 0))
        output = Sample(0, walk.advance().take_output(delta=True))
        parts.append(copy.deepcopy(output))
        if waiting is None:
            waiting = output
            continue
        before = vars(waiting)["sae_features"].chunks
        ANSWER.append(waiting, output)
        now = vars(waiting)["sae_features"]
        assert isinstance(now, PendingFeatures) and now.chunks is before
    found = ANSWER.__get__(waiting, Sample)
    made = [features for part in parts if (features := ANSWER.__get__(part, Sample))]
    one, other = found["m"]["post_block.1"], merge_all(made)["m"]["post_block.1"]
    assert one.to_json() == other.to_json()
    assert len(one) == 3 * MANY_CHUNKS - 1


def test_features_that_are_made_are_joined_too() -> None:
    walk = Walk()
    outputs = []
    for step in ((PROMPT, 0, 0), (1, 0, 0), (1, 0, 0)):
        walk.step(("r", *step))
        outputs.append(Sample(0, walk.advance().take_output(delta=True)))
    first = outputs[1]
    assert ANSWER.__get__(first, Sample)
    ANSWER.append(first, outputs[2])
    record = ANSWER.__get__(first, Sample)["m"]["post_block.1"]
    assert record.positions.tolist() == [PROMPT, PROMPT + 1]
    plain = Sample(0, None)
    ANSWER.append(plain, Sample(0, None))
    assert ANSWER.__get__(plain, Sample) is None


def test_many_pieces_of_a_request_are_joined() -> None:
    walk = Walk()
    for _ in range(3 * MANY_CHUNKS):
        walk.step(("r", PROMPT, 0, 0))
        found = walk.advance().take_output(delta=False)
        assert len(found.chunks) <= MANY_CHUNKS
    record = found.make()["m"]["post_block.1"]
    assert record.positions.tolist() == list(range(PROMPT, PROMPT + len(record)))
    assert len(record) == 3 * MANY_CHUNKS - 1
