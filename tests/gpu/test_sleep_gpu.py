# SPDX-License-Identifier: Apache-2.0
"""Sleep, wake-up and new model weights under captured CUDA graphs, on both runners.

vLLM sleeps only with its own allocator, which not every build has. A second test does
without it what level 2 does to memory.

Float32 throughout. What the same engine says before is right, or what an engine says
that starts with the other weights; other tests compare these with Hugging Face.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from steering_testing import models
from steering_testing.engine import (
    DELTA,
    FULL,
    VECTORS,
    engine,
    generate,
    params,
    runner,
    sae_spec,
    save_sae,
)
from steering_testing.matrix import CLAMPS, FAMILY
from steering_testing.matrix import POST as SITE
from steering_testing.observe import steps_of
from steering_testing.oracle import Greedy
from steering_testing.pytest_process import run_pytest
from steering_testing.reference import random_sae
from steering_testing.requests import Modules, prompt, vector

from vllm import LLM
from vllm.compilation.monitor import set_cudagraph_capturing_enabled
from vllm.device_allocator.cumem import cumem_available
from vllm.entrypoints.steering import (
    SteeringModuleError,
    list_modules,
    register_module,
)

# Set in the process of one engine that sleeps.
ALONE = "STEERING_SLEEP_ALONE"
TOKENS, TOLERANCE = 8, 1e-2
SPARE = [{"layer": 1, "hook": "resid_post", "width": 160}]
OPTIONS: dict[str, Any] = {
    "attention_backend": "TRITON_ATTN",
    "max_num_seqs": 8,
    "enforce_eager": False,
    "gpu_memory_utilization": 0.1,
    "cudagraph_metrics": True,
}
SAES = {
    "jumprelu": random_sae(160, models.HIDDEN, "jumprelu", 3),
    "topk": random_sae(96, models.HIDDEN, "topk", 4),
}


@contextmanager
def steered(root: Path, saved: Path, **options: Any) -> Iterator[LLM]:
    """An engine with an SAE of each kind, a vector and a free slot.

    Unless it is eager, it has run captured graphs when the block ends.
    """
    # The first engine of a test forbids capture once it has captured.
    set_cudagraph_capturing_enabled(True)
    saes = {name: {SITE: sae} for name, sae in SAES.items()}
    paths = Modules(saes, {"v": {SITE: vector(1)}}).save(saved)
    options = {**OPTIONS, **options}
    with (
        engine(FAMILY, root, paths, {"spare": SPARE}, **options) as llm,
        steps_of(llm) as steps,
    ):
        yield llm
        if not options["enforce_eager"]:
            assert steps.graphs["FULL"] > 0, steps


def ask(llm: LLM) -> list[Greedy]:
    """What requests of each tier and module, and a plain one, are answered."""
    asks = [
        params(TOKENS, **{tier: [sae_spec(name, {SITE: CLAMPS})]})
        for tier in (FULL, DELTA)
        for name in SAES
    ]
    asks.append(params(TOKENS, **{VECTORS: [{"module_name": "v", "scale": 1.5}]}))
    asks.append(params(TOKENS))
    llm.reset_prefix_cache()
    found = generate(llm, [prompt(7, 21)] * len(asks), asks)
    runner(llm).steering.check_integrity()
    # The edits change something, so that a lost module would be seen.
    assert len({tuple(one.logprobs) for one in found}) == len(found)
    return found


def check(llm: LLM, said: list[Greedy]) -> None:
    """The same batch is answered alike, up to rounding."""
    for at, (found, before) in enumerate(zip(ask(llm), said, strict=True)):
        assert found.tokens == before.tokens, at
        pairs = zip(found.logprobs, before.logprobs, strict=True)
        worst = max(abs(one - other) for one, other in pairs)
        assert worst < TOLERANCE, f"request {at}: off by {worst}"


def check_hot(llm: LLM, path: str) -> None:
    """A free slot takes a module, which says what its namesake says."""
    register_module(llm, "hot", path)
    asks = [
        params(TOKENS, **{FULL: [sae_spec(name, {SITE: CLAMPS})]})
        for name in ("jumprelu", "hot")
    ]
    one, other = generate(llm, [prompt(7, 21)] * 2, asks)
    assert one.tokens == other.tokens


def check_asleep(llm: LLM, path: str) -> None:
    """Modules can be listed, and not changed: their memory is not there."""
    assert list(list_modules(llm)) == [*SAES, "v"]
    with pytest.raises(SteeringModuleError, match="asleep") as caught:
        register_module(llm, "hot", path)
    assert caught.value.status == 409


def discard(tensor: torch.Tensor) -> None:
    """Leave what memory may hold that was given back and taken again."""
    tensor.data.fill_(float("nan") if tensor.is_floating_point() else 0x7F)


@pytest.mark.parametrize("use_v2", ["0", "1"])
def test_what_level_2_discards_comes_back(
    use_v2: str, model_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker saves and restores the model's buffers, and nothing else."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", use_v2)
    hot = save_sae(tmp_path / "hot", {SITE: SAES["jumprelu"]})
    with steered(model_root, tmp_path) as llm:
        said = ask(llm)
        model, steering = runner(llm).model, runner(llm).steering
        saved = {name: one.cpu().clone() for name, one in model.named_buffers()}
        workspace = steering.modules.backend.workspace
        scratch = [one for one in vars(workspace).values() if torch.is_tensor(one)]
        assert len(scratch) >= 5
        for tensor in (*model.buffers(), *model.parameters(), *scratch):
            discard(tensor)
        for name, buffer in model.named_buffers():
            buffer.data.copy_(saved[name].data)
        llm.collective_rpc("reload_weights")
        llm.reset_prefix_cache()
        # Kernels whose blocks wait for one another do so again.
        check(llm, said)
        check_hot(llm, hot)


@pytest.mark.skipif(not cumem_available, reason="this vLLM has no allocator to sleep")
@pytest.mark.parametrize("use_v2", ["0", "1"])
def test_steering_sleeps_and_wakes_with_the_model(tmp_path: Path, use_v2: str) -> None:
    """In a process of its own: vLLM's allocator serves one engine for each process."""
    printed = run_pytest(
        tmp_path,
        {"alone": ["-q", f"{__file__}::test_one_engine_sleeps"]},
        {"VLLM_USE_V2_MODEL_RUNNER": use_v2, ALONE: "1"},
    )["alone"]
    assert "1 passed" in printed, printed[-2000:]


@pytest.mark.skipif(ALONE not in os.environ, reason="it is run by the test before")
def test_one_engine_sleeps(model_root: Path, tmp_path: Path) -> None:
    hot = save_sae(tmp_path / "hot", {SITE: SAES["jumprelu"]})
    with steered(model_root, tmp_path, enable_sleep_mode=True) as llm:
        said = ask(llm)
        llm.sleep(level=1)
        check_asleep(llm, hot)
        llm.wake_up()
        check(llm, said)
        llm.sleep(level=2)
        check_asleep(llm, hot)
        llm.wake_up(tags=["weights"])
        llm.collective_rpc("reload_weights")
        llm.wake_up(tags=["kv_cache"])
        check(llm, said)
        check_hot(llm, hot)


@pytest.fixture(scope="module")
def right(model_root: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Greedy]:
    """What an engine says that starts with the other model."""
    root = tmp_path_factory.mktemp("elsewhere")
    (root / f"{FAMILY}-0").symlink_to(models.save(FAMILY, model_root, seed=1))
    saved = tmp_path_factory.mktemp("modules")
    with steered(root, saved, enforce_eager=True, cudagraph_metrics=False) as llm:
        return ask(llm)


@pytest.mark.parametrize("use_v2", ["0", "1"])
def test_steering_stays_when_the_model_gets_new_weights(
    use_v2: str,
    right: list[Greedy],
    model_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", use_v2)
    other = models.save(FAMILY, model_root, seed=1)
    with steered(model_root, tmp_path) as llm:
        said = ask(llm)
        assert said != right
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(other)})
        check(llm, right)
        state = models.build(FAMILY, 0).state_dict()
        weights = [(name, tensor.cuda()) for name, tensor in state.items()]
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        check(llm, said)
