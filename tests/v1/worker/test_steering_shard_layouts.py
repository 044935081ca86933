# SPDX-License-Identifier: Apache-2.0
"""Shared SAEs together with the other ways to divide an engine, and with what else
changes a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from steering_testing import copied, matrix, models, oracle
from steering_testing.adapters import save_adapter
from steering_testing.engine import (
    FULL,
    TRACED,
    answer_of,
    assert_same,
    engine,
    generate,
    params,
    sae_spec,
    save_sae,
)
from steering_testing.observe import steps_of
from steering_testing.reference import Edit, random_sae
from steering_testing.requests import prompt, specs
from steering_testing.shard_engines import (
    INLINE,
    LATE,
    POINTS,
    POST,
    RANKS,
    TRANSCODERS,
    Read,
    check_counters,
    check_late_modules,
    check_reading,
    check_requests,
    clamps,
    late_slot,
    modules,
    native,
    requests,
    save,
    stats,
)

from vllm.entrypoints.steering import (
    SteeringModuleError,
    register_module,
    replace_module,
)
from vllm.lora.request import LoRARequest

pytestmark = pytest.mark.engine

FOUR_RANKS: dict[str, Any] = {**RANKS, "tensor_parallel_size": 4}


@pytest.fixture(autouse=True)
def unbound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")


@pytest.mark.slow
def test_stages_whose_ranks_share_saes_equal_hugging_face(
    model_root: Path, tmp_path: Path
) -> None:
    """The first stage has layers 0 and 1, the second layer 2; two ranks each."""
    last = (2, "post_block")
    steering = {
        "spare": [late_slot(POST), late_slot(last)],
        "inline_vectors": {**INLINE["inline_vectors"], **copied.INLINE},
    }
    given = {**save(tmp_path), **copied.save(tmp_path)}
    # vLLM's CPU runner makes the buffers between stages in its compile warm-up.
    options = {**RANKS, "pipeline_parallel_size": 2, **TRACED}
    reads = [
        Read("topk", (2, "post_attn"), top_k=4),
        Read("points", POINTS[2], top_k=6),
        Read("transcoders", TRANSCODERS[1], top_k=5),
    ]
    with engine(matrix.FAMILY, model_root, given, steering, **options) as llm:
        check_requests(llm)
        check_reading(llm, reads)
        copied.check_requests(llm)
        copied.check_reading(llm, stages=2)
        check_counters(llm, stages=2)
        for site in (POST, last):
            root = tmp_path / f"{site[0]}"
            root.mkdir()
            check_late_modules(llm, root, site)


@pytest.mark.slow
def test_experts_that_ranks_split_leave_the_stream_whole(
    model_root: Path, tmp_path: Path
) -> None:
    """By width: vLLM's CPU kernel cannot give ranks whole experts (it crashes)."""
    with engine("qwen3_moe", model_root, save(tmp_path), INLINE, **RANKS) as llm:
        check_requests(llm, family="qwen3_moe")


@pytest.mark.slow
def test_four_ranks_that_share_saes_equal_hugging_face(
    model_root: Path, tmp_path: Path
) -> None:
    """qwen3's tiny model has four heads."""
    with engine("qwen3", model_root, save(tmp_path), INLINE, **FOUR_RANKS) as llm:
        check_requests(llm, family="qwen3")


@pytest.mark.slow
def test_drafts_do_not_change_what_ranks_share(
    model_root: Path, tmp_path: Path
) -> None:
    drafter = {
        "method": "draft_model",
        "num_speculative_tokens": 2,
        "model": str(models.save("llama", model_root)),
    }
    options = {**RANKS, "speculative_config": drafter}
    with (
        engine(matrix.FAMILY, model_root, save(tmp_path), INLINE, **options) as llm,
        steps_of(llm) as steps,
    ):
        check_requests(llm, max_tokens=8)
    assert steps.drafted > steps.accepted > 0


@pytest.mark.slow
def test_adapters_do_not_change_what_ranks_share(
    model_root: Path, tmp_path: Path
) -> None:
    adapted = save_adapter(tmp_path / "adapter")
    lora = LoRARequest("a", 1, str(tmp_path / "adapter"))
    options = {**RANKS, "enable_lora": True, "max_lora_rank": 8, "max_loras": 2}
    asked = requests()
    prompts = [prompt(700 + at, 5 + at % 6) for at in range(len(asked))]
    sampling = [params(3, **specs(*asks)) for asks in asked]
    loras = [lora if at % 2 else None for at in range(len(asked))]
    with engine("llama", model_root, save(tmp_path), INLINE, **options) as llm:
        inputs = [{"prompt_token_ids": ids} for ids in prompts]
        outputs = llm.generate(inputs, sampling, use_tqdm=False, lora_request=loras)
    for at, output in enumerate(outputs):
        model = adapted if at % 2 else models.build("llama")
        found = answer_of(output)
        edits = modules().edits(*map(native, asked[at]))
        expected = oracle.follow(model, prompts[at], edits, found.tokens)
        assert_same(found, expected, f"adapter {at % 2}: {asked[at]}")


@pytest.mark.slow
def test_cached_blocks_are_those_of_the_same_shared_sae(
    model_root: Path, tmp_path: Path
) -> None:
    """A second request finds the first one's blocks, and a plain one does not."""
    ids = prompt(31, 100)
    steered = params(6, **{FULL: [sae_spec("jumprelu", {POST: clamps()})]})
    edits = {POST: [Edit("full", modules().saes["jumprelu"][POST], clamps())]}
    model = models.build(matrix.FAMILY)
    options = {**RANKS, "block_size": 32}
    with engine(matrix.FAMILY, model_root, save(tmp_path), **options) as llm:
        for sampling, sites in ((steered, edits), (params(6), {})):
            expected = oracle.greedy(model, ids, sites, 6)
            for cached in (0, 96):
                inputs = [{"prompt_token_ids": ids}]
                (output,) = llm.generate(inputs, sampling, use_tqdm=False)
                assert output.num_cached_tokens == cached
                assert_same(answer_of(output), expected)


@pytest.mark.slow
def test_what_ranks_share_is_there_after_sleep(
    model_root: Path, tmp_path: Path
) -> None:
    sae = random_sae(LATE, models.HIDDEN, "jumprelu", 3)
    path, ids = save_sae(tmp_path / "late", {POST: sae}), prompt(7, 21)
    ask = params(6, **{FULL: [sae_spec("late")]})
    edits = {POST: [Edit("full", sae)]}
    expected = oracle.greedy(models.build(matrix.FAMILY), ids, edits, 6)
    steering = {"spare": [late_slot(POST)]}
    with engine(matrix.FAMILY, model_root, {}, steering, **RANKS) as llm:
        register_module(llm, "late", path)
        before = stats(llm)
        llm.sleep(level=1)
        try:
            assert stats(llm) == before
            with pytest.raises(SteeringModuleError, match="asleep"):
                replace_module(llm, "late", path)
        finally:
            llm.wake_up()
        assert_same(generate(llm, [ids], [ask])[0], expected)
        replace_module(llm, "late", path)
        assert_same(generate(llm, [ids], [ask])[0], expected)
