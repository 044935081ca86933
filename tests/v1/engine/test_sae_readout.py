# SPDX-License-Identifier: Apache-2.0
"""Reading features of a running engine, against Hugging Face with hooks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from steering_testing import models
from steering_testing.engine import engine, runner, sae_spec, save_sae
from steering_testing.observe import steps_of
from steering_testing.reads import activations, assert_reads, first_rise
from steering_testing.reference import Clamp, DenseSAE, Edit, random_sae
from torch.utils._python_dispatch import TorchDispatchMode

from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.layers import steering_readout as layer
from vllm.plugins.steering.v1.engine import input_processor
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import steering_admission
from vllm.v1.engine.steering_read_log import ReadLog
from vllm.v1.engine.steering_read_outputs import Readings
from vllm.v1.engine.steering_reads import StepReads
from vllm.v1.worker.steering_readout import SteeringReadout

SITE, EARLIER = (1, "post_block"), (0, "pre_attn")
PROMPTS = [[5, 9, 33, 71, 12, 40], [7, 3, 3, 90], [11, 24, 60, 61, 62, 63, 64]]
ACTIVATIONS = ("jumprelu", "relu", "topk")


def sae_of(activation: str) -> DenseSAE:
    sae = random_sae(96, models.HIDDEN, activation, seed=ACTIVATIONS.index(activation))
    return sae


SAES = {activation: sae_of(activation) for activation in ACTIVATIONS}


@pytest.fixture(scope="module")
def llm(model_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    root = tmp_path_factory.mktemp("saes")
    modules = {
        name: save_sae(root / name, {SITE: sae, EARLIER: sae})
        for name, sae in SAES.items()
    }
    with engine("gemma2", model_root, modules, block_size=16) as found:
        yield found


def ask(max_tokens: int = 6, **extra: Any) -> SamplingParams:
    return SamplingParams(
        temperature=0,
        max_tokens=max_tokens,
        ignore_eos=True,
        detokenize=False,
        logprobs=0,
        extra_args=extra or None,
    )


def read(module: str, **spec: Any) -> list[dict[str, Any]]:
    sites = spec.pop("sites", {"post_block": [1]})
    return [{"module_name": module, "sites": sites, **spec}]


def run(llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> list[Any]:
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = llm.generate(inputs, params, use_tqdm=False)
    runner(llm).steering.check_integrity()
    return outputs


def check(
    output: Any, sae: DenseSAE, module: str, edits: Any = None, **asked: Any
) -> None:
    """Every answer of the output, and its prompt, has the entries it should."""
    prompt, model = output.prompt_token_ids, models.build("gemma2")
    for answer in output.outputs:
        tokens = list(answer.token_ids)
        seen = activations(model, prompt, tokens, {SITE: sae}, edits)[SITE]
        for features, first, expected in (
            (output.prompt_sae_features, 0, seen[: len(prompt)]),
            (answer.sae_features, len(prompt), seen[len(prompt) :]),
        ):
            if all(acts is None for acts in expected):
                assert features == {}
            else:
                record = features[module]["post_block.1"]
                assert_reads(record, expected, first, **asked)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_top_activations_are_those_of_hugging_face(llm: LLM, activation: str) -> None:
    params = [ask(sae_readout_specs=read(activation, top_k=5))] * len(PROMPTS)
    for output in run(llm, PROMPTS, params):
        check(output, SAES[activation], activation, top_k=5)


def test_given_features_are_returned_active_or_not(llm: LLM) -> None:
    spec = read("jumprelu", features=[80, 3, 41])
    for output in run(llm, PROMPTS, [ask(sae_readout_specs=spec)] * 3):
        check(output, SAES["jumprelu"], "jumprelu", features=[80, 3, 41])


def test_reading_sees_the_edits_before_it_and_not_the_reconstruction(llm: LLM) -> None:
    sae = SAES["jumprelu"]
    clamp = Clamp(7, "additive", 3.0)
    specs = {
        "sae_clamp_specs": [sae_spec("jumprelu", {SITE: [clamp], EARLIER: [clamp]})],
        "sae_full_reconstruction_specs": [sae_spec("jumprelu", {SITE: [clamp]})],
        "sae_readout_specs": read("jumprelu", top_k=8),
    }
    edits = {
        EARLIER: [Edit("delta", sae, [clamp])],
        SITE: [Edit("delta", sae, [clamp]), Edit("full", sae, [clamp])],
    }
    for output in run(llm, PROMPTS, [ask(**specs)] * 3):
        check(output, sae, "jumprelu", edits, top_k=8)


def test_reading_changes_no_token_alone_or_beside_others(llm: LLM) -> None:
    plain = [o.outputs[0] for o in run(llm, PROMPTS, [ask(9)] * 3)]
    reading = ask(9, sae_readout_specs=read("relu", top_k=64, sites=None))
    for mix in ([reading] * 3, [ask(9), reading, ask(9)]):
        outputs = [o.outputs[0] for o in run(llm, PROMPTS, mix)]
        assert [o.token_ids for o in outputs] == [o.token_ids for o in plain]
        assert [o.logprobs for o in outputs] == [o.logprobs for o in plain]
    assert plain[0].sae_features is None


def test_where_nobody_reads_nothing_of_reading_runs(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def record(owner: Any, name: str) -> None:
        stock = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return stock(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    parts = [
        (SteeringReadout, "_write_index"),
        (SteeringReadout, "_write_tables"),
        (layer, "write_rows"),
        (StepReads, "take"),
        (ReadLog, "add"),
        (Readings, "advance"),
    ]
    for owner, name in parts:
        record(owner, name)
    full = {"sae_full_reconstruction_specs": [sae_spec("relu")]}
    outputs = run(llm, PROMPTS, [ask(5), ask(5, **full), ask(5)])
    assert calls == []
    assert runner(llm).steering.readout.take_step() is None
    assert all(output.outputs[0].sae_features is None for output in outputs)
    run(llm, PROMPTS[:1], [ask(1, sae_readout_specs=read("relu", top_k=1))])
    assert set(calls) == {name for _, name in parts}


def test_an_idle_step_runs_no_tensor_operation_of_steering(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None on the worker's way; what the sites do is in the graph."""
    calls: list[list[Any]] = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            calls[-1].append(func)
            return func(*args, **(kwargs or {}))

    own = runner(llm)
    parts = ("update_steering_requests", "prepare_steering", "take_steering_readout")
    for name in parts:
        stock = getattr(own, name)

        def counted(*args: Any, stock: Any = stock) -> Any:
            calls.append([])
            with Count():
                return stock(*args)

        monkeypatch.setattr(own, name, counted)
    run(llm, PROMPTS, [ask(3, sae_readout_specs=read("relu", top_k=1)), ask(3), ask(3)])
    assert any(calls), "reading runs some"
    run(llm, PROMPTS[:1], [ask(1)])  # gives the tokens of the step before no row
    calls.clear()
    run(llm, PROMPTS, [ask(5)] * 3)
    assert len(calls) == 5 * len(parts) and not any(calls)


def test_a_request_is_parsed_once_in_the_front_end_and_once_in_the_core(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for owner in (input_processor, steering_admission):
        stock = owner.parse_steering_request

        def parse(*args: Any, owner: Any = owner, stock: Any = stock) -> Any:
            calls.append(owner.__name__.rpartition(".")[2])
            return stock(*args)

        monkeypatch.setattr(owner, "parse_steering_request", parse)
    run(llm, PROMPTS[:1], [ask(2, sae_readout_specs=read("relu", top_k=1))])
    assert calls == ["input_processor", "steering_admission"]


def test_a_prompt_that_is_cached_is_read_and_stays_in_the_cache(llm: LLM) -> None:
    prompt = [20 + at for at in range(64)]
    run(llm, [prompt], [ask(2)])
    (output,) = run(llm, [prompt], [ask(2, sae_readout_specs=read("relu", top_k=4))])
    assert output.num_cached_tokens == 0
    check(output, SAES["relu"], "relu", top_k=4)
    (output,) = run(
        llm, [prompt], [ask(2, sae_readout_specs=read("relu", top_k=4, phase="decode"))]
    )
    assert output.num_cached_tokens > 0
    assert output.prompt_sae_features == {}
    record = output.outputs[0].sae_features["relu"]["post_block.1"]
    assert record.positions.tolist() == [64]


def test_skipped_tokens_have_no_entry(llm: LLM) -> None:
    prompt = [models.BOS, 5, models.EOS, 9]
    (output,) = run(llm, [prompt], [ask(3, sae_readout_specs=read("topk", top_k=4))])
    check(output, SAES["topk"], "topk", top_k=4)


def test_a_feature_ends_the_request_on_its_own_token(llm: LLM) -> None:
    (free,) = run(llm, PROMPTS[:1], [ask(12, sae_readout_specs=read("relu", top_k=64))])
    record = free.outputs[0].sae_features["relu"]["post_block.1"]
    dense = record.to_dense()
    # A feature that is strong on the fifth generated token, and not before.
    feature = int((dense[4] - dense[:4].max(axis=0)).argmax())
    bound = float((dense[4, feature] + dense[:4, feature].max()) / 2)
    stop = [{"feature_idx": feature, "above": bound}]
    spec = read("relu", top_k=2, stop_if=stop)
    (output,) = run(llm, PROMPTS[:1], [ask(12, sae_readout_specs=spec)])
    answer = output.outputs[0]
    assert answer.token_ids == free.outputs[0].token_ids[:5]
    assert answer.finish_reason == "stop"
    assert answer.stop_reason == f"sae:relu:post_block.1:{feature}"
    record = answer.sae_features["relu"]["post_block.1"]
    assert record.positions.tolist() == [6, 7, 8, 9, 10]
    late = ask(12, sae_readout_specs=spec)
    late.min_tokens = 12
    (output,) = run(llm, PROMPTS[:1], [late])
    assert output.outputs[0].finish_reason == "length"


NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_max": 3,
    "prompt_lookup_min": 1,
}


def test_several_answers_to_one_prompt_each_have_their_own_entries(llm: LLM) -> None:
    params = SamplingParams(
        n=3, temperature=1.0, seed=4, max_tokens=4, ignore_eos=True, detokenize=False,
        extra_args={"sae_readout_specs": read("relu", top_k=4)},
    )  # fmt: skip
    (output,) = run(llm, PROMPTS[:1], [params])
    assert len({tuple(answer.token_ids) for answer in output.outputs}) > 1
    check(output, SAES["relu"], "relu", top_k=4)


@pytest.mark.parametrize("drafts", [False, True])
def test_chunks_preemption_and_drafts_leave_each_position_once(
    model_root: Path, tmp_path: Path, drafts: bool
) -> None:
    path = save_sae(tmp_path / "sae", {SITE: SAES["jumprelu"]})
    options: dict[str, Any] = {
        "num_gpu_blocks_override": 16,
        "block_size": 16,
        "max_model_len": 96,
    }
    if drafts:
        options["speculative_config"] = NGRAM
    steps_of_prompts = (1, 2, 3, 5, 7, 11, 13, 4)
    prompts = [[3 + at * by % 17 for at in range(30)] for by in steps_of_prompts]
    with (
        engine("gemma2", model_root, {"jumprelu": path}, max_num_batched_tokens=32,
               enable_chunked_prefill=True, **options) as llm,
        steps_of(llm) as steps,
    ):  # fmt: skip
        specs = read("jumprelu", top_k=4)
        outputs = run(llm, prompts, [ask(32, sae_readout_specs=specs)] * 8)
    assert steps.chunks and steps.preempted
    assert not drafts or steps.accepted < steps.drafted
    for output in outputs:
        check(output, SAES["jumprelu"], "jumprelu", top_k=4)


@pytest.mark.parametrize("drafts", [False, True])
def test_a_feature_ends_requests_beside_others(
    model_root: Path, tmp_path: Path, drafts: bool
) -> None:
    """With drafts, tokens after the one that fires may have been accepted already."""
    options: dict[str, Any] = {"speculative_config": NGRAM} if drafts else {}
    path = save_sae(tmp_path / "sae", {SITE: SAES["relu"]})
    prompts = [[3 + at * by % 7 for at in range(20)] for by in (1, 2, 3, 5)]
    whole = read("relu", top_k=64)
    with engine("gemma2", model_root, {"relu": path}, **options) as llm:
        with steps_of(llm) as steps:
            free = run(llm, prompts, [ask(24, sae_readout_specs=whole)] * 4)
        assert not drafts or steps.accepted > 0
        asked, wanted = [], []
        for at, output in enumerate(free):
            answer = output.outputs[0]
            dense = answer.sae_features["relu"]["post_block.1"].to_dense()
            token, feature, bound = first_rise(dense)
            stop = [{"feature_idx": feature, "above": bound}]
            stops = read("relu", top_k=2, stop_if=stop)
            asked.append(ask(24, **({} if at == 3 else {"sae_readout_specs": stops})))
            wanted.append((token + 1, feature))
        outputs = run(llm, prompts, asked)
    for at, (output, other) in enumerate(zip(outputs, free, strict=True)):
        answer, tokens = output.outputs[0], list(other.outputs[0].token_ids)
        count, feature = wanted[at] if at < 3 else (24, None)
        assert list(answer.token_ids) == tokens[:count]
        if feature is None:
            assert answer.finish_reason == "length" and answer.sae_features is None
            continue
        assert answer.stop_reason == f"sae:relu:post_block.1:{feature}"
        record = answer.sae_features["relu"]["post_block.1"]
        assert record.positions.tolist() == list(range(20, 20 + count))


def test_a_result_that_is_held_until_it_ends_has_a_largest_size(llm: LLM) -> None:
    both = {"post_block": [1], "pre_attn": [0]}
    specs = read("relu", top_k=64, sites=both)  # 128 values a token
    engine = llm.llm_engine

    def admit(n: int, max_tokens: int | None, kind: RequestOutputKind) -> None:
        params = SamplingParams(
            n=n,
            max_tokens=max_tokens,
            detokenize=False,
            output_kind=kind,
            extra_args={"sae_readout_specs": specs},
        )
        prompt = {"prompt_token_ids": PROMPTS[0]}
        try:
            engine.add_request("held", prompt, params)
        finally:
            engine.abort_request(["held"])

    whole, parts = RequestOutputKind.FINAL_ONLY, RequestOutputKind.DELTA
    for n, max_tokens in ((64, 128), (32, 100_000), (32, None)):
        admit(n, max_tokens, whole)
    for n, max_tokens, found in ((64, 129, 64 * 129), (33, None, 33 * 250)):
        with pytest.raises(VLLMValidationError) as caught:
            admit(n, max_tokens, whole)
        assert caught.value.parameter == "max_tokens"
        message = str(caught.value)
        assert f"found up to {found} generated tokens" in message
        assert "expected at most 8192 tokens, which is 1048576 values" in message
        with pytest.raises(VLLMValidationError):
            admit(n, max_tokens, RequestOutputKind.CUMULATIVE)
        admit(n, max_tokens, parts)
    specs = read("relu", top_k=64, sites=both, phase="prefill")
    admit(64, 129, whole)
