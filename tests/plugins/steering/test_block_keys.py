# SPDX-License-Identifier: Apache-2.0
"""Prefix-cache keys: only requests with equal steering share steered blocks."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from steering_testing.specs import admitted

import vllm.plugins.steering as plugin
from vllm import SamplingParams
from vllm.config.sae_steering_admission import admitted_schedule
from vllm.config.sae_steering_specs import ROWS_KEY
from vllm.config.sae_steering_types import parse_steering_request
from vllm.config.steering import ModuleInfo, SiteInfo, SteeringConfig, Tier
from vllm.config.steering_points import HookPoint
from vllm.distributed.kv_transfer.kv_connector.v1.mooncake.store.data import (
    ChunkedTokenDatabase,
    KeyMetadata,
)
from vllm.exceptions import VLLMValidationError
from vllm.plugins.steering.seam import BOUND
from vllm.plugins.steering.v1.core.kv_cache_utils import TARGET
from vllm.utils.hashing import sha256
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.kv_cache_utils import get_request_block_hasher
from vllm.v1.core.steering_block_keys import steering_block_key
from vllm.v1.request import Request

PROMPT = 10


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    plugin.install_front_end_seams()


def request(prefill: str | None, decode: str | None, **kwargs: Any) -> Request:
    rows = {"prefill": prefill, "decode": decode}
    steered = prefill or decode
    params = SamplingParams(extra_args={ROWS_KEY: rows} if steered else None)
    made = Request("r", list(range(PROMPT)), params, None, **kwargs)
    made.append_output_token_ids(list(range(10)))
    return made


def keys(req: Request, start: int, end: int) -> Any:
    return kv_cache_utils.generate_block_hash_extra_keys(req, start, end, 0)[0]


def test_a_block_of_prompt_has_the_prefill_digest() -> None:
    assert keys(request("p", "d"), 0, PROMPT) == (("steering", "p"),)


def test_a_block_of_output_has_the_decode_digest() -> None:
    assert keys(request("p", "d"), PROMPT, 16) == (("steering", "d"),)


@pytest.mark.parametrize("block", [(0, 4), (8, 12), (12, 16)])
def test_blocks_of_a_request_steered_alike_in_both_phases_look_alike(
    block: tuple[int, int],
) -> None:
    assert keys(request("s", "s"), *block) == (("steering", "s"),)


def test_a_block_without_steered_tokens_has_the_stock_key() -> None:
    assert keys(request(None, "d"), 0, PROMPT) is None
    assert keys(request("p", None), PROMPT, 16) is None


def test_an_unsteered_request_has_the_stock_keys() -> None:
    plain = request(None, None, cache_salt="salt")
    assert keys(plain, 0, 16) == BOUND[TARGET](plain, 0, 16, 0)[0]


def test_stock_keys_stay_in_front() -> None:
    steered = request("p", "p", cache_salt="salt")
    assert keys(steered, 0, 16) == (("cache_salt", "salt"), ("steering", "p"))


def test_a_straddling_block_equals_no_other() -> None:
    blocks = {
        steering_block_key([(change, prefill), (None, decode)], 0, 16)
        for change in (0, 1, 8, 15, 16)
        for prefill in (None, "a", "b")
        for decode in (None, "a", "b")
        if prefill != decode
    }
    # Six pairs: the three inner boundaries differ each; the outer two show one phase.
    assert len(blocks) == 3 * 6 + len({None, ("steering", "a"), ("steering", "b")})


def test_kv_events_accept_the_key() -> None:
    key = keys(request("p", "d"), 8, 12)
    (event,) = kv_cache_utils.to_event_extra_keys([key])
    assert event == (key[0][1],)
    assert all(isinstance(part, str) for part in key[0])


SITES = (SiteInfo(1, HookPoint.POST_BLOCK, 8, 16),)
CONFIG = SteeringConfig({"a": ModuleInfo("a", "sae", "p", "native", "da", SITES)})
FULL = "sae_full_reconstruction_specs"


def asked(*parts: tuple[float, str, int, int | None]) -> dict[str, Any]:
    """A request that clamps one feature in spans: value, of, start, stop."""
    return {
        FULL: [
            {
                "module_name": "a",
                "clamps": [{"feature_idx": 1, "kind": "absolute", "value": value}],
                "spans": [{"of": of, "start": start, "stop": stop}],
            }
            for value, of, start, stop in parts
        ]
    }


def small_requests() -> list[dict[str, Any]]:
    """All of one span, and all of two that do not overlap, of a prompt of four."""
    ends = (1, 2, None)
    spans = [("prompt", a, b) for a in (-3, -1, 0, 1) for b in (None, -1, 3)]
    spans += [
        ("generated", a, b) for a in (0, 1, 2) for b in ends if b is None or a < b
    ]
    found: list[dict[str, Any]] = [{}]
    for one in ((value, *span) for value in (1.0, 2.0) for span in spans):
        for other in (
            None,
            *((value, *span) for value in (1.0, 3.0) for span in spans),
        ):
            given = asked(one) if other is None else asked(one, other)
            with suppress(VLLMValidationError):
                parse_steering_request(given, CONFIG)
                found.append(given)
    return found


def test_every_pair_of_small_schedules_shares_the_blocks_that_are_edited_alike() -> (
    None
):
    """From what a client writes to the key: equal exactly where the edits of every
    position of the block are equal."""
    length, block = 4, 2
    by_key: dict[Any, set[Any]] = {}
    by_content: dict[Any, set[Any]] = {}
    requests = small_requests()
    for given in requests:
        args = admitted(given or None, CONFIG, length)
        schedule = admitted_schedule(args or {}, length)
        request = parse_steering_request(given, CONFIG)
        edits = []
        for position in range(8):
            when = None
            if request is not None:
                pieces = request.schedule(length)
                when = next(p for p in pieces if p.stop is None or position < p.stop)
            found = () if when is None else request.edits(Tier.FULL, when.when)
            edits.append(found)
        for start in range(0, 8, block):
            key = start % block, steering_block_key(schedule, start, start + block)
            content = tuple(edits[start : start + block])
            by_key.setdefault(key, set()).add(content)
            by_content.setdefault(content, set()).add(key)
    assert len(requests) > 200 and len(by_key) > 15
    assert all(len(found) == 1 for found in by_key.values())
    assert all(len(found) == 1 for found in by_content.values())


def test_blocks_are_shared_exactly_where_every_position_is_edited_alike() -> None:
    """All pairs of small schedules, at every block of four positions."""
    schedules = [
        [(first, a), (second, b), (None, c)]
        for first in range(0, 9, 2)
        for second in range(first + 1, 10, 3)
        for a in (None, "x")
        for b in (None, "x", "y")
        for c in (None, "x")
    ]

    def content(schedule: Any, start: int) -> tuple[str | None, ...]:
        return tuple(
            next(d for stop, d in schedule if stop is None or at < stop)
            for at in range(start, start + 4)
        )

    for start in (0, 4, 8):
        by_key: dict[Any, set[Any]] = {}
        by_content: dict[Any, set[Any]] = {}
        for schedule in schedules:
            key = steering_block_key(schedule, start, start + 4)
            edits = content(schedule, start)
            by_key.setdefault(key, set()).add(edits)
            by_content.setdefault(edits, set()).add(key)
        assert all(len(found) == 1 for found in by_key.values())
        assert all(len(found) == 1 for found in by_content.values())
        assert len(by_key) > 5


@pytest.mark.parametrize("block", [2, 4])
def test_the_keys_of_a_mooncake_store_contain_the_steering(block: int) -> None:
    """Of blocks as large as those that are hashed, and of twice as large ones."""
    hash_block = 2
    kv_cache_utils.init_none_hash(sha256)
    hasher = get_request_block_hasher(hash_block, sha256)
    metadata = KeyMetadata("model", tp_rank=0, pcp_rank=0, dcp_rank=0, pp_rank=0)
    store = ChunkedTokenDatabase(metadata, block, hash_block)

    def stored(prefill: str | None, decode: str | None) -> list[str]:
        hashes = request(prefill, decode, block_hasher=hasher).block_hashes
        chunks = store.process_tokens(16, hashes)
        return [store.key_for(hashed) for _, _, hashed in chunks]

    plain, steered = stored(None, None), stored("p", "d")
    assert len(plain) == 16 // block
    assert stored("p", "d") == steered
    for other in (plain, stored("q", "d"), stored("d", "p")):
        assert not set(other) & set(steered)
    # Blocks of a prompt that nothing edits are everybody's.
    shared = PROMPT // block
    assert stored(None, "d")[:shared] == plain[:shared]
    assert not set(stored(None, "d")[shared:]) & set(plain)
