# SPDX-License-Identifier: Apache-2.0
"""A change of modules happens on every data-parallel rank or on none."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from vllm.config.steering_json import Json
from vllm.config.steering_replies import ModuleReply, Outcome
from vllm.v1.engine.steering_ranks import (
    change_presets_together,
    change_together,
    merged,
)

DONE = ModuleReply(outcome=Outcome.DONE, config={"version": 1})
NAME = "sea"
CALLER = "a"


class Ranks:
    """Registries that note what they are asked, and answer as told.

    Args:
        count: how many.
        answers: (rank, phase or action) -> its reply, in place of `DONE`.
    """

    def __init__(self, count: int, answers: dict[tuple[int, str], ModuleReply]):
        self.count = count
        self.answers = answers
        self.asked: list[str] = []
        self.changes: set[str] = set()

    async def __call__(self, action: str, payload: Json) -> list[ModuleReply]:
        step = payload.get("phase", action)
        self.asked.append(step)
        self.changes |= {payload["change"]} if "change" in payload else set()
        if action == "release":
            assert payload == {"name": NAME, "caller": CALLER}
        return [self.answers.get((rank, step), DONE) for rank in range(self.count)]


def change(ranks: Ranks) -> ModuleReply:
    payload = {"module": {"name": NAME}, "drain": True, "caller": CALLER}
    return asyncio.run(change_together(ranks, "register", payload))


def refusal(outcome: Outcome) -> ModuleReply:
    return ModuleReply(outcome=outcome, error="no", field="path")


def test_all_ranks_load_close_prepare_and_finish_one_change() -> None:
    ranks = Ranks(3, {})
    assert change(ranks).outcome is Outcome.DONE
    assert ranks.asked == ["load", "close", "prepare", "finish"]
    assert len(ranks.changes) == 1


def test_no_rank_refuses_requests_while_another_still_loads() -> None:
    ranks = Ranks(3, {(1, "load"): ModuleReply(outcome=Outcome.LOADING)})
    assert change(ranks).outcome is Outcome.LOADING
    assert ranks.asked == ["load"]


@pytest.mark.parametrize(
    ("rank", "outcome"),
    itertools.product((0, 1, 2), (Outcome.INVALID, Outcome.CONFLICT, Outcome.FAILED)),
)
@pytest.mark.parametrize(
    ("phase", "then"),
    [
        ("load", ["release"]),
        ("close", ["release"]),
        ("prepare", ["rollback", "release"]),
    ],
)
def test_one_rank_that_refuses_leaves_every_rank_as_it_was(
    rank: int, outcome: Outcome, phase: str, then: list[str]
) -> None:
    ranks = Ranks(3, {(rank, phase): refusal(outcome)})
    reply = change(ranks)
    assert (reply.outcome, reply.field) == (outcome, "path")
    assert f"rank {rank}" in reply.error
    assert ranks.asked[ranks.asked.index(phase) + 1 :] == then


def test_requests_of_any_rank_are_waited_for() -> None:
    waiting = ModuleReply(outcome=Outcome.DRAINING, in_use=2)
    ranks = Ranks(3, {(0, "close"): waiting, (2, "close"): waiting})
    reply = change(ranks)
    assert (reply.outcome, reply.in_use) == (Outcome.DRAINING, 4)
    assert ranks.asked == ["load", "close"]


def test_a_rank_in_use_at_the_last_moment_undoes_the_others() -> None:
    late = ModuleReply(outcome=Outcome.DRAINING, in_use=1)
    ranks = Ranks(2, {(1, "prepare"): late})
    assert change(ranks).outcome is Outcome.DRAINING
    assert ranks.asked == ["load", "close", "prepare", "rollback", "release"]


@pytest.mark.parametrize("rank", [None, 0, 1, 2])
def test_presets_change_on_every_rank_or_on_none(rank: int | None) -> None:
    no = refusal(Outcome.CONFLICT)
    ranks = Ranks(3, {} if rank is None else {(rank, "prepare"): no})
    payload = {"name": "calm"}
    reply = asyncio.run(change_presets_together(ranks, "delete_preset", payload))
    if rank is None:
        assert (reply.outcome, ranks.asked) == (Outcome.DONE, ["prepare", "finish"])
    else:
        assert reply.outcome is Outcome.CONFLICT
        assert f"rank {rank}" in reply.error
        assert ranks.asked == ["prepare", "rollback"]
    assert len(ranks.changes) == 1


def test_a_module_that_one_rank_has_removed_takes_no_requests_of_others() -> None:
    gone, kept = (
        {"name": name, "requests": requests, "draining": name == "gone"}
        for name, requests in (("gone", 0), ("kept", 3))
    )
    for rows in ([[gone, kept], [kept]], [[kept], [gone, kept]]):
        listed = [{"modules": modules, "free_slots": []} for modules in rows]
        replies = [ModuleReply(outcome=Outcome.DONE, listing=one) for one in listed]
        listing = merged(replies).listing
        assert listing is not None
        found = {row["name"]: row["requests"] for row in listing["modules"]}
        assert found == ({"gone": 0, "kept": 6} if len(rows[0]) == 2 else {"kept": 6})


def test_lists_and_counts_are_of_all_ranks() -> None:
    module = {"name": NAME, "requests": 1, "draining": False}
    listings = [
        {"modules": [module], "free_slots": []},
        {"modules": [{**module, "requests": 2, "draining": True}], "free_slots": []},
    ]
    replies = [ModuleReply(outcome=Outcome.DONE, listing=one) for one in listings]
    listing = merged(replies).listing
    assert listing is not None
    assert listing["modules"] == [{"name": NAME, "requests": 3, "draining": True}]
    tokens = {"full": {"prefill": 3, "decode": 1}}
    stats = {"steered_tokens": tokens, "bytes": [7], "modules": [NAME]}
    one = {**stats, "module_tokens": {NAME: {"bypassed": 1}}}
    # A module that only one rank has counted a token of.
    other = {**stats, "module_tokens": {NAME: {"bypassed": 2}, "b": {"bypassed": 5}}}
    replies = [ModuleReply(outcome=Outcome.DONE, stats=s) for s in (one, other)]
    both = merged(replies).stats
    assert both == {
        "steered_tokens": {"full": {"prefill": 6, "decode": 2}},
        "module_tokens": {NAME: {"bypassed": 3}, "b": {"bypassed": 5}},
        "bytes": [7, 7],
        "modules": [NAME],
    }
