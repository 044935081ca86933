# SPDX-License-Identifier: Apache-2.0
"""A position given as an embedding has no id: nothing bypasses it by id."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from steering_testing import models, oracle
from steering_testing.engine import (
    FULL,
    assert_same,
    engine,
    generate,
    params,
    sae_spec,
    save_sae,
)
from steering_testing.oracle import Greedy
from steering_testing.reference import Clamp, DenseSAE, Edit, random_sae
from steering_testing.requests import prompt

from vllm import LLM
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.steering_embeds import (
    NO_TOKEN_ID,
    embedded_positions,
    known_token_ids,
)
from vllm.v1.worker.steering_index import BatchView

FAMILY, SITE, BLOCK, TOKENS = "llama", (1, "post_block"), 32, 6
CLAMPS = [Clamp(5, "absolute", 4.0)]


def new_request(
    embeds: int | None, is_token_ids: list[bool] | None = None
) -> NewRequestData:
    return NewRequestData(
        req_id="r",
        prompt_token_ids=None,
        mm_features=[],
        sampling_params=None,
        pooling_params=None,
        block_ids=([],),
        num_computed_tokens=0,
        lora_request=None,
        prompt_embeds=None if embeds is None else torch.zeros(embeds, 4),
        prompt_is_token_ids=is_token_ids,
    )


def test_positions_without_an_id_are_known() -> None:
    assert embedded_positions(new_request(None)) is None
    assert embedded_positions(new_request(2)).tolist() == [True, True]
    mixed = embedded_positions(new_request(3, [True, False, True]))
    assert mixed.tolist() == [False, True, False]


def test_ids_of_embedded_positions_are_hidden_wherever_the_step_is() -> None:
    """Request b has four embedded positions; the step has its last two and decodes."""
    view = BatchView(
        req_ids=["a", "b", "c"],
        num_scheduled=np.array([2, 4, 1]),
        num_computed=np.array([0, 2, 9]),
        prompt_len=np.array([2, 4, 4]),
        token_ids=torch.arange(10, 20),
    )
    embedded = {"b": np.ones(4, dtype=bool), "c": np.ones(4, dtype=bool)}
    ids = known_token_ids(view, 7, embedded).tolist()
    assert ids == [10, 11, NO_TOKEN_ID, NO_TOKEN_ID, 14, 15, 16]
    assert view.token_ids.tolist() == list(range(10, 20))
    assert known_token_ids(view, 7, {}).tolist() == list(range(10, 17))


def sae(skip: tuple[int, ...]) -> DenseSAE:
    found = random_sae(96, models.HIDDEN, "jumprelu", 3)
    found.skip_token_ids = skip
    return found


@pytest.fixture(scope="module")
def llm(model_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    path = save_sae(tmp_path_factory.mktemp("sae") / "m", {SITE: sae(models.SPECIAL)})
    options: dict[str, Any] = {"enable_prompt_embeds": True, "block_size": BLOCK}
    with engine(FAMILY, model_root, {"m": path}, **options) as llm:
        yield llm


def table() -> torch.Tensor:
    return models.build(FAMILY).get_input_embeddings().weight.detach()


def ask(llm: LLM, prompts: list[dict[str, Any]]) -> list[Greedy]:
    """Each prompt with only its prompt steered."""
    spec = {FULL: [sae_spec("m", {SITE: CLAMPS}, "prefill")]}
    outputs = llm.generate(prompts, params(TOKENS, **spec), use_tqdm=False)
    return [
        Greedy(
            list(completion.token_ids),
            [
                step[token].logprob
                for step, token in zip(
                    completion.logprobs, completion.token_ids, strict=True
                )
            ],
        )
        for completion in (output.outputs[0] for output in outputs)
    ]


def expected(ids: list[int], skip: tuple[int, ...]) -> Greedy:
    edits = {SITE: [Edit("full", sae(skip), CLAMPS, phase="prefill")]}
    return oracle.greedy(models.build(FAMILY), ids, edits, TOKENS)


@pytest.mark.engine
@pytest.mark.parametrize("before", models.SPECIAL)
def test_an_embedded_prompt_is_steered_whatever_was_in_its_place(
    llm: LLM, before: int
) -> None:
    """Special tokens given as embeddings are not recognised either."""
    ids = [models.BOS, *prompt(3, 20)[1:], models.PAD, 9]
    llm.reset_prefix_cache()
    generate(llm, [[before] * 30], [params(1)])
    [found] = ask(llm, [{"prompt_embeds": table()[ids]}])
    assert_same(found, expected(ids, ()))


@pytest.mark.engine
def test_ids_and_embeddings_without_special_tokens_say_the_same(llm: LLM) -> None:
    ids = prompt(4, 20)[1:]
    by_id, embedded = ask(
        llm, [{"prompt_token_ids": ids}, {"prompt_embeds": table()[ids]}]
    )
    assert_same(embedded, by_id)
    assert_same(embedded, expected(ids, models.SPECIAL))


@pytest.mark.engine
def test_a_mixed_prompt_is_bypassed_where_it_has_ids_only(llm: LLM) -> None:
    """Special tokens at 0 and 4 are given by id, at 3 and 6 as embeddings."""
    ids = [models.BOS, 5, 6, models.BOS, models.PAD, 7, models.EOS, 8]
    is_id = [True, True, False, False, True, True, False, True]
    [found] = ask(
        llm,
        [
            {
                "prompt_embeds": table()[ids],
                "prompt_token_ids": ids,
                "prompt_is_token_ids": is_id,
            }
        ],
    )
    # For the oracle, embedded special tokens are other ids with the same embedding.
    model = models.build(FAMILY)
    alias = {models.BOS: 100, models.EOS: 101}
    weight = model.get_input_embeddings().weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            for special, other in alias.items():
                weight[other] = weight[special]
        seen = [
            token if given else alias.get(token, token)
            for token, given in zip(ids, is_id, strict=True)
        ]
        edits = {SITE: [Edit("full", sae(models.SPECIAL), CLAMPS, phase="prefill")]}
        right = oracle.follow(model, seen, edits, found.tokens)
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    assert not set(found.tokens) & set(alias.values()), "the oracle's model differs"
    assert_same(found, right)


@pytest.mark.engine
def test_a_cached_embedded_prompt_says_what_a_fresh_one_says(llm: LLM) -> None:
    ids = [models.PAD, *prompt(5, 70)[1:], models.BOS]
    llm.reset_prefix_cache()
    generate(llm, [[models.PAD] * 80], [params(1)])
    inputs = {"prompt_embeds": table()[ids]}
    cold, warm = ask(llm, [inputs])[0], ask(llm, [inputs])[0]
    assert_same(cold, expected(ids, ()))
    assert_same(warm, cold)
