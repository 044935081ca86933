# SPDX-License-Identifier: Apache-2.0
"""An engine whose requests may read every active feature of a token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from steering_testing import models
from steering_testing.engine import engine, runner, save_sae
from steering_testing.observe import steps_of
from steering_testing.reads import activations, assert_reads
from steering_testing.reference import random_sae

from vllm import SamplingParams
from vllm.entrypoints.steering import encode
from vllm.exceptions import VLLMValidationError

SITE = (1, "post_block")
SAE = random_sae(700, models.HIDDEN, "relu", seed=4)  # about half of it is active
STEPS = (1, 2, 3, 5, 7, 11, 13, 4, 6)
PROMPTS = [[3 + at * by % 17 for at in range(30)] for by in STEPS]
OPTIONS: dict[str, Any] = {
    "num_gpu_blocks_override": 16,
    "block_size": 16,
    "max_model_len": 96,
    "max_num_batched_tokens": 32,
    "enable_chunked_prefill": True,
    "speculative_config": {
        "method": "ngram",
        "num_speculative_tokens": 2,
        "prompt_lookup_max": 2,
        "prompt_lookup_min": 1,
    },
}


def ask(**spec: Any) -> SamplingParams:
    specs = [{"module_name": "wide", **spec}]
    return SamplingParams(
        temperature=0,
        max_tokens=12,
        ignore_eos=True,
        detokenize=False,
        extra_args={"sae_readout_specs": specs},
    )


def test_all_active_features_are_read_in_chunks_preempted_and_drafted(
    model_root: Path, tmp_path: Path
) -> None:
    """Only an engine with the option does so; its requests may also read little."""
    modules = {"wide": save_sae(tmp_path / "wide", {SITE: SAE})}
    asked: list[dict[str, Any]] = [
        {"top_k": 512},
        {"features": list(range(3, 603, 2))},
        {"top_k": 3},
    ]
    option = {"max_read_values": 512}
    with (
        engine("gemma2", model_root, modules, option, **OPTIONS) as llm,
        steps_of(llm) as steps,
    ):
        inputs = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
        params = [ask(**asked[at % 3]) for at in range(len(PROMPTS))]
        outputs = llm.generate(inputs, params, use_tqdm=False)
        runner(llm).steering.check_integrity()
        (text,) = encode(llm, "wide", PROMPTS[:1], top_k=512)
        with pytest.raises(VLLMValidationError, match="1..512"):
            llm.generate(inputs[:1], ask(top_k=513), use_tqdm=False)
    assert steps.chunks and steps.preempted and steps.accepted < steps.drafted
    most = 0
    for at, output in enumerate(outputs):
        prompt, (answer,) = output.prompt_token_ids, output.outputs
        tokens = list(answer.token_ids)
        model = models.build("gemma2")
        seen = activations(model, prompt, tokens, {SITE: SAE})[SITE]
        for features, first, expected in (
            (output.prompt_sae_features, 0, seen[: len(prompt)]),
            (answer.sae_features, len(prompt), seen[len(prompt) :]),
        ):
            record = features["wide"]["post_block.1"]
            assert_reads(record, expected, first, flips=2, **asked[at % 3])
            if at % 3 == 0:
                assert (record.counts == record.num_active).all()
                most = max(most, int(record.counts.max()))
    assert most > 256
    whole, again = outputs[0].prompt_sae_features["wide"], text.features
    np.testing.assert_array_equal(
        whole["post_block.1"].counts, again["post_block.1"].counts
    )
