# SPDX-License-Identifier: Apache-2.0
"""KV that one engine computed and another takes over: only under the same steering."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from steering_testing import hash_connector, models, offload, oracle
from steering_testing.engine import (
    DELTA,
    FULL,
    assert_same,
    engine,
    sae_spec,
    save_sae,
)
from steering_testing.oracle import Greedy
from steering_testing.reference import Clamp, Edit, random_sae
from steering_testing.requests import prompt

from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig
from vllm.engine import steering_kv_connectors

pytestmark = pytest.mark.engine

FAMILY, SITE, BLOCK, TOKENS = "llama", (1, "post_block"), 32, 6
IDS = prompt(7, 2 * BLOCK + 6)
SAES = [random_sae(96, models.HIDDEN, "relu", seed) for seed in (3, 4)]
CLAMPS = [Clamp(5, "absolute", 4.0)]
FULL_ASK = {FULL: [sae_spec("m", {SITE: CLAMPS})]}
DELTA_ASK = {DELTA: [sae_spec("m", {SITE: CLAMPS})]}


@contextmanager
def connected(root: Path, store: Path, sae: str) -> Iterator[LLM]:
    """An engine that stores KV where others find it, with `sae` as its module `m`."""
    transfer = KVTransferConfig(
        kv_connector=hash_connector.NAME,
        kv_role="kv_both",
        kv_connector_extra_config={"shared_storage_path": str(store)},
    )
    options = {"block_size": BLOCK, "kv_transfer_config": transfer}
    with engine(FAMILY, root, {"m": sae}, **options) as llm:
        yield llm


def ask(llm: LLM, asked: dict[str, Any]) -> tuple[Greedy, int]:
    """What the engine says, and how many tokens it did not compute."""
    sampling = SamplingParams(
        temperature=0,
        max_tokens=TOKENS,
        logprobs=0,
        ignore_eos=True,
        detokenize=False,
        extra_args=asked or None,
    )
    (output,) = llm.generate([{"prompt_token_ids": IDS}], sampling, use_tqdm=False)
    completion = output.outputs[0]
    ids = list(completion.token_ids)
    steps = zip(completion.logprobs, ids, strict=True)
    return Greedy(ids, [step[i].logprob for step, i in steps]), output.num_cached_tokens


def expected(found: Greedy, tier: str | None, which: int = 0) -> Greedy:
    edits = {SITE: [Edit(tier, SAES[which], CLAMPS)]} if tier else {}
    return oracle.follow(models.build(FAMILY), IDS, edits, found.tokens)


def test_kv_of_another_engine_is_taken_only_under_the_same_steering(
    model_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without it, every engine hashes blocks with a random seed of its own.
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    allowed = (*steering_kv_connectors.BLOCK_HASH_CONNECTORS, hash_connector.NAME)
    monkeypatch.setattr(steering_kv_connectors, "BLOCK_HASH_CONNECTORS", allowed)
    hash_connector.register()
    first, second = (
        save_sae(tmp_path / str(at), {SITE: sae}) for at, sae in enumerate(SAES)
    )
    store = tmp_path / "kv"
    whole = 2 * BLOCK
    with connected(model_root, store, first) as llm:
        found, cached = ask(llm, FULL_ASK)
        assert_same(found, expected(found, "full"), "computed")
        assert cached == 0
    with connected(model_root, store, first) as llm:
        for asked, tier in (({}, None), (DELTA_ASK, "delta")):
            found, cached = ask(llm, asked)
            assert_same(found, expected(found, tier), f"{tier} after full")
            assert cached == 0, tier
        found, cached = ask(llm, FULL_ASK)
        assert_same(found, expected(found, "full"), "taken over")
        assert cached == whole
    # A module of the same name with other weights is other steering.
    with connected(model_root, store, second) as llm:
        found, cached = ask(llm, FULL_ASK)
        assert_same(found, expected(found, "full", 1), "other weights")
        assert cached == 0
        found, cached = ask(llm, {})
        assert_same(found, expected(found, None), "plain, taken over")
        assert cached == whole


OFFLOADS: dict[str, dict[str, Any]] = {
    "OffloadingConnector": {"spec_name": offload.SPEC, "cpu_bytes_to_use": 1 << 26},
    "SimpleCPUOffloadConnector": {"cpu_bytes_to_use": 1 << 26},
}


@pytest.mark.parametrize(
    "connector",
    [*OFFLOADS, pytest.param("MultiConnector", marks=pytest.mark.slow)],
)
def test_offloaded_kv_comes_back_only_under_the_same_steering(
    connector: str, model_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stock's connectors, that store on the host what the device forgets."""
    offload.without_a_gpu(monkeypatch)
    extra = OFFLOADS.get(connector) or {
        "connectors": [
            {
                "kv_connector": "OffloadingConnector",
                "kv_role": "kv_both",
                "kv_connector_extra_config": OFFLOADS["OffloadingConnector"],
            }
        ]
    }
    transfer = KVTransferConfig(
        kv_connector=connector, kv_role="kv_both", kv_connector_extra_config=extra
    )
    path = save_sae(tmp_path / "sae", {SITE: SAES[0]})
    options = {"block_size": BLOCK, "kv_transfer_config": transfer}
    whole = 2 * BLOCK
    asks = [(FULL_ASK, "full"), ({}, None), (DELTA_ASK, "delta")]
    with engine(FAMILY, model_root, {"m": path}, **options) as llm:
        for asked, tier in asks:
            found, cached = ask(llm, asked)
            assert_same(found, expected(found, tier), f"{tier}, computed")
            assert cached == 0, tier
            # A step of another request, in which the copies are made.
            llm.generate([{"prompt_token_ids": [5, 6]}], use_tqdm=False)
            assert llm.reset_prefix_cache()
        for asked, tier in asks:
            found, cached = ask(llm, asked)
            assert_same(found, expected(found, tier), f"{tier}, from the host")
            assert cached == whole, tier
            assert llm.reset_prefix_cache()
