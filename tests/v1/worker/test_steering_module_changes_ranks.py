# SPDX-License-Identifier: Apache-2.0
"""A change of modules is all or nothing over two ranks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
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
from steering_testing.reference import Edit, random_sae
from steering_testing.requests import prompt
from steering_testing.shard_engines import RANKS, weight_bytes

from vllm import LLM
from vllm.entrypoints.steering import (
    SteeringModuleError,
    list_modules,
    register_module,
    replace_module,
    unregister_module,
)

pytestmark = pytest.mark.engine

SITE = (1, "post_block")
IDS = prompt(7, 20)
D_SAE = 96
Fault = Callable[[Any], None]


def on_second_rank(where: str, name: str, error: str, text: str) -> Fault:
    """Makes one call fail, once, on the second rank only.

    The function that comes back runs in the workers, which cannot import this file: it
    goes by value.

    Args:
        where: the module of what fails, or a class in it as `module:Class`.
        name: of the function.
        error: the exception's name, of `builtins` or of `torch`.
        text: its text. A copy into a slot fails after it was made.
    """

    def inject(worker: Any) -> None:
        import builtins
        import importlib

        import torch

        if worker.rank != 1:
            return
        module, _, cls = where.partition(":")
        owner = importlib.import_module(module)
        owner = vars(owner)[cls] if cls else owner
        stock = vars(owner)[name]
        kind = vars(builtins).get(error) or vars(torch)[error]

        def fail(*args: Any, **kwargs: Any) -> None:
            setattr(owner, name, stock)
            if name == "fill":
                stock(*args, **kwargs)
            raise kind(text)

        setattr(owner, name, fail)

    return inject


CHANGES = "vllm.v1.worker.steering_module_changes"
PLACE = "vllm.v1.worker.steering_places:SAEPlace"
INSPECTOR = "vllm.model_executor.model_loader.sae_inspector:ModuleInspector"
WEIGHTS = "vllm.model_executor.layers.steering_state:SAEWeights"
# What fails, and the status and the text of the answer.
FAULTS: list[tuple[Fault, int, str]] = [
    (
        on_second_rank(INSPECTOR, "load", "ValueError", "the file is cut"),
        400,
        "the file is cut; nothing was changed",
    ),
    (
        on_second_rank(INSPECTOR, "load", "OSError", "the disk is gone"),
        500,
        "the disk is gone; nothing was changed",
    ),
    (
        on_second_rank(WEIGHTS, "tensors", "OutOfMemoryError", "no host memory"),
        400,
        "no host memory; nothing was changed",
    ),
    (
        on_second_rank(WEIGHTS, "tensors", "MemoryError", "none left"),
        400,
        "none left; nothing was changed",
    ),
    (
        on_second_rank(f"{CHANGES}:ModuleChanges", "_take", "MemoryError", ""),
        400,
        "MemoryError; nothing was changed",
    ),
    (
        on_second_rank(PLACE, "content", "OutOfMemoryError", "no copy of the old"),
        400,
        "no copy of the old; nothing was changed",
    ),
    (
        on_second_rank(PLACE, "fill", "OutOfMemoryError", "no device memory"),
        400,
        "no device memory; nothing was changed",
    ),
    (
        on_second_rank(PLACE, "fill", "RuntimeError", "a copy failed"),
        500,
        "a copy failed; nothing was changed",
    ),
    (
        on_second_rank(f"{CHANGES}:ModuleChanges", "_bind", "RuntimeError", "bind"),
        500,
        "bind; nothing was changed",
    ),
]


def saes() -> dict[str, Any]:
    return {
        kind: random_sae(D_SAE, models.HIDDEN, kind, 3) for kind in ("relu", "topk")
    }


@functools.cache
def answer(kind: str) -> oracle.Greedy:
    """What a request says under the module of this kind."""
    edits = {SITE: [Edit("full", saes()[kind])]}
    return oracle.greedy(models.build("llama"), IDS, edits, 6)


def check(llm: LLM, kind: str) -> None:
    """The module that serves is the one of this kind."""
    llm.reset_prefix_cache()
    (found,) = generate(llm, [IDS], [params(6, **{FULL: [sae_spec("hot")]})])
    assert_same(found, answer(kind), kind)


def with_nan(source: str, path: Path, feature: int) -> str:
    """A copy of a module, with a NaN in the encoder's row of a feature."""
    path.mkdir()
    for file in Path(source).iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    (file,) = path.glob("*.safetensors")
    tensors = load_file(file)
    tensors["W_enc"][feature, 3] = torch.nan
    save_file(tensors, file)
    return str(path)


def check_bad_files(llm: LLM, good: str, tmp_path: Path) -> None:
    """A NaN that only one rank reads takes both back, whichever it is."""
    for feature in (0, D_SAE - 1):
        bad = with_nan(good, tmp_path / f"nan-{feature}", feature)
        with pytest.raises(SteeringModuleError, match="W_enc.* NaN") as caught:
            replace_module(llm, "hot", bad)
        assert caught.value.status == 400
        assert f"feature {feature}; nothing was changed" in str(caught.value)
        check(llm, "relu")


def check_removals(llm: LLM, kind: str) -> None:
    """A removal that fails on one rank leaves the module on both."""
    target = f"{CHANGES}:ModuleChanges"
    llm.collective_rpc(on_second_rank(target, "_keep", "RuntimeError", "kept"))
    with pytest.raises(SteeringModuleError, match="kept; nothing was changed"):
        unregister_module(llm, "hot")
    assert list(list_modules(llm)) == ["hot"]
    check(llm, kind)


@pytest.mark.parametrize(
    "sharding", ["shard", pytest.param("replicate", marks=pytest.mark.slow)]
)
def test_a_rank_that_fails_takes_all_ranks_back(
    sharding: str, model_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    paths = {
        kind: save_sae(tmp_path / kind, {SITE: sae}) for kind, sae in saes().items()
    }
    spare = {
        "layer": 1,
        "hook": "resid_post",
        "width": D_SAE,
        "count": 2,
        "sharding": sharding,
    }
    with engine("llama", model_root, {}, {"spare": [spare]}, **RANKS) as llm:
        # The first module fails on its way in: the slot stays free.
        fault, status, text = FAULTS[6]
        llm.collective_rpc(fault)
        with pytest.raises(SteeringModuleError, match=text) as caught:
            register_module(llm, "hot", paths["relu"])
        assert caught.value.status == status and list_modules(llm) == {}
        replace_module(llm, "hot", paths["relu"])
        check(llm, "relu")
        held = weight_bytes(llm)
        for fault, status, text in FAULTS:
            llm.collective_rpc(fault)
            with pytest.raises(SteeringModuleError, match=text) as caught:
                replace_module(llm, "hot", paths["topk"])
            assert caught.value.status == status
            assert weight_bytes(llm) == held
            check(llm, "relu")
        check_bad_files(llm, paths["relu"], tmp_path)
        replace_module(llm, "hot", paths["topk"])
        check(llm, "topk")
        check_removals(llm, "topk")
        unregister_module(llm, "hot")
        assert weight_bytes(llm) <= held and list_modules(llm) == {}
        replace_module(llm, "hot", paths["relu"])
        check(llm, "relu")
