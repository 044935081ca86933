# SPDX-License-Identifier: Apache-2.0
"""Steps on their way from the scheduler to the front ends."""

from __future__ import annotations

import numpy as np
import pytest
from steering_testing.read_rows import PROMPT, SLOT, request_of, rows_of

from vllm.config.sae_readout_step import StepReadout, StepRows
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.engine.steering_read_log import LogReader, ReadLog
from vllm.v1.engine.steering_read_outbox import MAX_WAITING
from vllm.v1.engine.steering_reads import PAYLOAD_KEY, StepReads

KEPT_STEPS = 64


def test_front_ends_get_their_own_requests() -> None:
    reads = StepReads()
    requests = {
        name: request_of(name, client=client)
        for name, client in zip("abc", (0, 1, 0), strict=True)
    }
    spans = np.array([2, 3, 4]), np.array([0, 3, 5]), np.array([3, 2, 1])
    rows = np.concatenate([rows_of([at * 10 + n for n in range(size)])
                           for at, size in enumerate((3, 2, 1))])  # fmt: skip
    step = StepReadout(list("abc"), spans[1], spans[2], spans[0], {SLOT: rows})
    assert reads.take(step, spans[0], spans[2], requests) == {}
    outputs = {
        client: EngineCoreOutputs(outputs=[EngineCoreOutput("x", [1])])
        for client in (0, 1)
    }
    reads.attach(outputs)
    found = {}
    for client, own in outputs.items():
        (wire,) = own.outputs[0].ec_transfer_params[PAYLOAD_KEY]
        part = StepRows.from_wire(wire)
        layout = part.layout
        assert layout is not None
        assert part.new == {name: ((SLOT,), (99,)) for name in layout.req_ids}
        for name, span in zip(layout.req_ids, layout.spans.T.tolist(), strict=True):
            first, start, count = span
            read = part.rows[SLOT][first : first + count, 3].tolist()
            found[name] = (client, start, read)
    assert found == {
        "a": (0, 2, [0, 1, 2]),
        "b": (1, 3, [10, 11]),
        "c": (0, 4, [20]),
    }


def step_of(names: str, at: int) -> StepReadout:
    """One token of each request, at position `at`; its rows say `at`."""
    n = len(names)
    rows = rows_of([at] * n)
    return StepReadout(
        list(names), np.arange(n), np.ones(n, int), np.full(n, at), {SLOT: rows}
    )


@pytest.mark.parametrize("clients", [1, 2])
def test_a_step_that_goes_on_sends_rows_alone(clients: int) -> None:
    reads, logs = StepReads(), [ReadLog(KEPT_STEPS) for _ in range(clients)]
    owner = {name: at % clients for at, name in enumerate("abcd")}
    requests = {name: request_of(name, client=owner[name]) for name in "abcd"}
    readers = {name: LogReader(logs[owner[name]], name) for name in "abcd"}
    batches = ["abcd"] * 3 + ["abd"] * (KEPT_STEPS + 2) + ["abd"]
    heads = []
    for at, names in enumerate(batches, start=PROMPT):
        # The last step repeats positions: a preempted batch that starts again.
        at = PROMPT + 3 if at == PROMPT + len(batches) - 1 else at
        step = step_of(names, at)
        reads.take(step, step.num_computed, step.num_tokens, requests)
        outputs = {
            client: EngineCoreOutputs(outputs=[EngineCoreOutput("x", [1])])
            for client in range(clients)
        }
        reads.attach(outputs)
        for client, own in outputs.items():
            (wire,) = own.outputs[0].ec_transfer_params[PAYLOAD_KEY]
            heads.append(wire[0] is not None)
            logs[client].add(StepRows.from_wire(wire))
    news = [at in (0, 3, len(batches) - 1) for at in range(len(batches))]
    assert heads == [new for new in news for _ in range(clients)]
    for name, reader in readers.items():
        reader.pull()
        found = {
            chunk.first + at: int(row[3])
            for chunk in reader.chunks
            for at, row in enumerate(chunk.rows[0])
        }
        steps = 3 if name == "c" else len(batches) - 1
        assert found == {at: at for at in range(PROMPT, PROMPT + steps)}


def test_a_dropped_step_is_not_continued() -> None:
    reads = StepReads()
    requests = {"a": request_of("a")}
    for at in range(PROMPT, PROMPT + MAX_WAITING + 1):
        step = step_of("a", at)
        reads.take(step, step.num_computed, step.num_tokens, requests)
        if at == PROMPT:
            batch, requests = requests, {}  # aborted; the worker still reads it
    step = step_of("a", PROMPT + MAX_WAITING + 1)
    reads.take(step, step.num_computed, step.num_tokens, batch)
    (wire,) = reads.outbox.take(0)
    assert wire[0] is not None


def test_steps_of_ended_requests_do_not_wait_for_ever() -> None:
    reads = StepReads()
    for at in range(2 * MAX_WAITING):
        name = str(at)
        step = StepReadout(
            [name], np.array([0]), np.array([1]), np.array([0]), {SLOT: rows_of([0])}
        )
        # The request before this one has ended without an output.
        requests = {name: request_of(name)}
        reads.take(step, np.array([0]), np.array([1]), requests)
    assert len(reads.outbox) <= MAX_WAITING
