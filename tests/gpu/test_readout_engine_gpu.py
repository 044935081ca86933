# SPDX-License-Identifier: Apache-2.0
"""Reading features on a GPU: both runners, eager and captured, async scheduling.

Everything is float32 but attention, which multiplies in TF32: activations differ from
Hugging Face's by about 1e-3, so a feature near its threshold may fall either way.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from steering_testing import models
from steering_testing.engine import engine, runner, save_sae
from steering_testing.observe import steps_of
from steering_testing.reads import activations, first_rise
from steering_testing.reference import random_sae

from vllm import LLM, SamplingParams
from vllm.entrypoints.steering import evaluate

SITE = (1, "post_block")
OPTIONS: dict[str, Any] = {
    "attention_backend": "TRITON_ATTN",
    "max_num_seqs": 16,
    "gpu_memory_utilization": 0.1,
    "cudagraph_metrics": True,
}
CAPTURED = {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 64, 256, 512]}
MODES: dict[str, tuple[str, dict[str, Any]]] = {
    "v2-graphs": ("1", {"enforce_eager": False, "compilation_config": CAPTURED}),
    "v2-eager": ("1", {"enforce_eager": True}),
    "v1-graphs": ("0", {"enforce_eager": False, "compilation_config": CAPTURED}),
}
PROMPTS = [
    [3 + (7 * row + at * (row + 1)) % 100 for at in range(20)] for row in range(6)
]
NEAR = 2e-2
# (tokens, FVU, L0, three losses) of the first mode that was evaluated.
EVALUATED: list[list[float]] = []


def ask(max_tokens: int, **spec: Any) -> SamplingParams:
    extra = {"sae_readout_specs": [{"module_name": "sae", **spec}]} if spec else None
    return SamplingParams(
        temperature=0,
        max_tokens=max_tokens,
        ignore_eos=True,
        detokenize=False,
        extra_args=extra,
    )


def run(llm: LLM, params: list[SamplingParams]) -> list[Any]:
    inputs = [{"prompt_token_ids": prompt} for prompt in PROMPTS[: len(params)]]
    outputs = llm.generate(inputs, params, use_tqdm=False)
    runner(llm).steering.check_integrity()
    return outputs


def check(output: Any, sae: Any) -> None:
    """Every position has one entry, with the activations of Hugging Face."""
    prompt, answer = output.prompt_token_ids, list(output.outputs[0].token_ids)
    seen = activations(models.build("gemma2"), prompt, answer, {SITE: sae})[SITE]
    whole = [
        output.prompt_sae_features["sae"]["post_block.1"],
        output.outputs[0].sae_features["sae"]["post_block.1"],
    ]
    dense = torch.cat([torch.from_numpy(record.to_dense()) for record in whole])
    positions = [p for record in whole for p in record.positions.tolist()]
    assert positions == list(range(len(prompt) + len(answer) - 1))
    expected = torch.stack([acts for acts in seen if acts is not None]).float()
    listed = dense != 0
    bars = sae.threshold.float()
    near_bar = (expected - bars).abs() < NEAR
    wrong = listed & ((dense - expected).abs() > NEAR) & ~(near_bar | (expected == 0))
    assert not wrong.any()
    # What is listed and should be silent is just above its threshold.
    assert (dense[listed & (expected == 0)] < bars.max() + 1).all()


@pytest.mark.parametrize("mode", MODES)
def test_values_are_those_of_hugging_face(
    mode: str, model_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_v2, options = MODES[mode]
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", use_v2)
    sae = random_sae(96, models.HIDDEN, "jumprelu", seed=5)
    modules = {"sae": save_sae(tmp_path / "sae", {SITE: sae})}
    with engine("gemma2", model_root, modules, **{**OPTIONS, **options}) as llm:
        config = llm.llm_engine.vllm_config.scheduler_config
        assert config.async_scheduling
        plain = run(llm, [ask(10)] * 6)
        read = run(llm, [ask(10, top_k=32)] * 6)
        for output in read:
            check(output, sae)
        mixed = run(llm, [ask(10), ask(10, top_k=8)] * 3)
        assert [o.outputs[0].token_ids for o in mixed] == [
            o.outputs[0].token_ids for o in plain
        ]
        stop = [{"feature_idx": 0, "above": -1.0}]
        ended = run(llm, [ask(10, top_k=2, stop_if=stop)])[0].outputs[0]
        assert ended.stop_reason == "sae:sae:post_block.1:0"
        assert list(ended.token_ids) == list(plain[0].outputs[0].token_ids[:1])
        # Later in an answer, the step after the one that fires is on its way.
        record = read[0].outputs[0].sae_features["sae"]["post_block.1"]
        token, feature, bound = first_rise(record.to_dense())
        stop = [{"feature_idx": feature, "above": bound}]
        ended = run(llm, [ask(10, top_k=2, stop_if=stop)])[0].outputs[0]
        assert ended.stop_reason == f"sae:sae:post_block.1:{feature}"
        kept = plain[0].outputs[0].token_ids[: token + 1]
        assert list(ended.token_ids) == list(kept)
        record = ended.sae_features["sae"]["post_block.1"]
        assert len(record) == token + 1
        (site,) = evaluate(llm, "sae", PROMPTS)
        losses = [site.ce_plain, site.ce_reconstructed, site.ce_ablated]
        EVALUATED.append([site.tokens, site.fvu, site.l0, *losses])
        assert site.tokens == sum(map(len, PROMPTS)) and site.fvu > 0
        assert losses[1] != losses[0] != losses[2]
        # Graphs and eager steps measure the same, and afterwards graphs run again.
        assert EVALUATED[-1] == pytest.approx(EVALUATED[0], rel=1e-2)
        again = run(llm, [ask(10)] * 6)
        assert [o.outputs[0].token_ids for o in again] == [
            o.outputs[0].token_ids for o in plain
        ]


@pytest.mark.parametrize("use_v2", ["0", "1"])
def test_chunks_preemption_and_drafts(
    use_v2: str, model_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", use_v2)
    sae = random_sae(96, models.HIDDEN, "jumprelu", seed=5)
    modules = {"sae": save_sae(tmp_path / "sae", {SITE: sae})}
    options = {
        **OPTIONS,
        "enforce_eager": False,
        "max_num_batched_tokens": 24,
        "num_gpu_blocks_override": 24,
        "max_model_len": 128,
        "block_size": 16,
        "speculative_config": {
            "method": "ngram",
            "num_speculative_tokens": 3,
            "prompt_lookup_max": 3,
            "prompt_lookup_min": 1,
        },
    }
    with (
        engine("gemma2", model_root, modules, **options) as llm,
        steps_of(llm) as steps,
    ):
        for output in run(llm, [ask(40, top_k=32)] * 6):
            check(output, sae)
    assert steps.chunks and steps.preempted and steps.drafted, steps
