# SPDX-License-Identifier: Apache-2.0
"""Modules that come and go under captured CUDA graphs, on both runners.

Float32 throughout, Hugging Face on the CPU is the oracle; for the tolerance see
`test_engine_gpu.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from steering_testing import matrix, models
from steering_testing.engine import (
    DELTA,
    FULL,
    engine,
    generate,
    params,
    runner,
    sae_spec,
    save_sae,
)
from steering_testing.matrix import CLAMPS, FAMILY
from steering_testing.matrix import POST as SITE
from steering_testing.observe import KernelWatch, steps_of
from steering_testing.reference import DenseSAE, Edit, random_sae
from steering_testing.requests import prompt

from vllm import LLM
from vllm.config.steering_environment import BRANCHES_ENV
from vllm.entrypoints.steering import (
    register_module,
    replace_module,
    unregister_module,
)
from vllm.model_executor.layers.steering_kernels.branches import LEAST_MODULES

TOKENS, TOLERANCE = 8, 1e-2
SPARE = [{"layer": 1, "hook": "resid_post", "width": 192}]
OPTIONS: dict[str, Any] = {
    "attention_backend": "TRITON_ATTN",
    "max_num_seqs": 8,
    "enforce_eager": False,
    "gpu_memory_utilization": 0.1,
    "cudagraph_metrics": True,
}


def check(llm: LLM, name: str, sae: DenseSAE) -> None:
    """A steered request of each SAE tier, and a plain one beside them."""
    ids = prompt(7, 21)
    asks = [
        params(TOKENS, **{FULL: [sae_spec(name, {SITE: CLAMPS})]}),
        params(TOKENS, **{DELTA: [sae_spec(name, {SITE: CLAMPS})]}),
        params(TOKENS),
    ]
    found = generate(llm, [ids] * 3, asks)
    for result, tier in zip(found, ("full", "delta", None), strict=True):
        edits = {SITE: [Edit(tier, sae, CLAMPS)]} if tier else {}
        matrix.assert_near(result, ids, edits, TOLERANCE, f"{name}, {tier}")


@pytest.mark.parametrize("use_v2", ["0", "1"])
def test_captured_graphs_take_new_modules(
    use_v2: str, model_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", use_v2)
    saes = {
        "jumprelu": random_sae(160, models.HIDDEN, "jumprelu", 3),
        "topk": random_sae(96, models.HIDDEN, "topk", 4),
    }
    paths = {}
    for kind, sae in saes.items():
        paths[kind] = save_sae(tmp_path / kind, {SITE: sae})
    kernels = KernelWatch(monkeypatch)
    with (
        engine(FAMILY, model_root, {}, {"spare": SPARE}, **OPTIONS) as llm,
        steps_of(llm) as steps,
    ):
        kernels.serving()
        register_module(llm, "hot", paths["jumprelu"])
        check(llm, "hot", saes["jumprelu"])
        replace_module(llm, "hot", paths["topk"])
        check(llm, "hot", saes["topk"])
        unregister_module(llm, "hot")
        register_module(llm, "again", paths["jumprelu"], skip_token_ids=[])
        saes["jumprelu"].skip_token_ids = ()
        check(llm, "again", saes["jumprelu"])
        runner(llm).steering.check_integrity()
        assert steps.graphs["FULL"] > 0, steps
        kernels.assert_silent()


@pytest.mark.parametrize("use_v2", ["1", "0"])
def test_a_captured_site_of_many_modules_runs_those_in_use(
    use_v2: str, model_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None, one, and several of six, behind a conditional node of each graph."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", use_v2)
    monkeypatch.setenv(BRANCHES_ENV, "1")
    kinds = ("jumprelu", "topk", "relu")
    saes = {
        kind: random_sae(96, models.HIDDEN, kind, at) for at, kind in enumerate(kinds)
    }
    spare = [{**SPARE[0], "count": LEAST_MODULES}]
    ids = prompt(7, 21)

    def serve(llm: LLM, names: tuple[str, ...]) -> None:
        """A plain request beside one of each of these modules."""
        asks = [params(TOKENS, **{FULL: [sae_spec(n, {SITE: CLAMPS})]}) for n in names]
        found = generate(llm, [ids] * (len(asks) + 1), [*asks, params(TOKENS)])
        for result, name in zip(found, (*names, None), strict=True):
            edits = {SITE: [Edit("full", saes[name], CLAMPS)]} if name else {}
            matrix.assert_near(result, ids, edits, TOLERANCE, f"{name} of {names}")

    with (
        engine(FAMILY, model_root, {}, {"spare": spare}, **OPTIONS) as llm,
        steps_of(llm) as steps,
    ):
        for name, sae in saes.items():
            register_module(llm, name, save_sae(tmp_path / name, {SITE: sae}))
        backend = runner(llm).steering.modules.backend
        assert backend.branches is not None
        for names in ((), ("topk",), kinds, ("relu",), ("jumprelu", "relu"), ()):
            serve(llm, names)
        assert steps.graphs["FULL"] > 0, steps
