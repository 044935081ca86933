# SPDX-License-Identifier: Apache-2.0
"""In-process engines on the tiny models, and how tests ask them for text."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import torch
from steering_testing import models
from steering_testing.oracle import Greedy
from steering_testing.reference import Clamp, DenseSAE

from vllm import LLM, RequestOutput, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.model_executor.model_loader.sae_formats.native import save_native

# vLLM's CPU worker replaces this function by one that does nothing.
SET_THREADS = torch.set_num_threads
# A compiled engine without Inductor, which takes most of the time to start.
TRACED: dict[str, Any] = {
    "enforce_eager": False,
    "compilation_config": {"mode": 2, "backend": "eager"},
}
FULL, DELTA, VECTORS = (
    "sae_full_reconstruction_specs",
    "sae_clamp_specs",
    "steering_vector_specs",
)


def save_sae(
    path: Path, sites: Mapping[tuple[int, str], DenseSAE], **metadata: Any
) -> str:
    """Write oracle SAEs as a native directory; its path."""

    def content(sae: DenseSAE) -> dict[str, Any]:
        tensors = {
            name: getattr(sae, name).float()
            for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "W_skip")
            if getattr(sae, name) is not None
        }
        extra: dict[str, Any] = {"activation": sae.activation}
        if sae.k:
            extra |= {"k": sae.k, "topk_relu": sae.topk_relu}
        if sae.hook_out is not None:
            extra["hook_out"] = sae.hook_out
        return {**tensors, **extra}

    save_native(path, {at: content(sae) for at, sae in sites.items()}, **metadata)
    return str(path)


def flagged(path: str, flag: str) -> str:
    """The native directory, whose first site is said to be so (`SiteInfo`)."""
    manifest = Path(path) / "manifest.json"
    data = json.loads(manifest.read_text())
    data["sites"][0][flag] = True
    manifest.write_text(json.dumps(data))
    return path


@contextmanager
def engine(
    family: str,
    root: Path,
    modules: Mapping[str, Any] | None,
    steering: Mapping[str, Any] | None = None,
    **options: Any,
) -> Iterator[LLM]:
    """A vLLM engine on a family's tiny model, in this process, float32.

    `modules=None` configures no steering at all. Eager unless `enforce_eager=False`.
    """
    checkpoint = models.save(family, root)
    with (
        restored(type(models.build(family).base_model.get_decoder())),
        engine_on(checkpoint, modules, steering, **options) as llm,
    ):
        yield llm


@contextmanager
def engine_on(
    checkpoint: Path,
    modules: Mapping[str, Any] | None,
    steering: Mapping[str, Any] | None = None,
    **options: Any,
) -> Iterator[LLM]:
    """As `engine`, on a checkpoint of any model."""
    config: dict[str, Any] = {}
    if modules is not None:
        config = {"steering": {"modules": dict(modules), **(steering or {})}}
    defaults: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "kv_cache_memory_bytes": 1 << 27,
        "max_model_len": 256,
        "max_num_seqs": 32,
        "enforce_eager": True,
        "additional_config": config,
    }
    threads = torch.get_num_threads()
    llm: LLM | None = None
    try:
        llm = LLM(str(checkpoint), **{**defaults, **options})
        yield llm
    finally:
        # An engine that did not start has left groups behind, too.
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
        torch._dynamo.reset()
        # Numba, which drafts by n-grams need, sets the threads of PyTorch too.
        torch.set_num_threads = SET_THREADS
        SET_THREADS(threads)
        gc.collect()


@contextmanager
def squeezed(
    family: str,
    root: Path,
    modules: Mapping[str, Any] | None,
    steering: Mapping[str, Any] | None = None,
    **options: Any,
) -> Iterator[LLM]:
    """An engine with few tokens a step, and a cache too small for a batch.

    Fails unless it preempts requests while it is used.
    """
    small: dict[str, Any] = {
        "max_num_batched_tokens": 24,
        "max_num_seqs": 8,
        "enable_prefix_caching": False,
        "num_gpu_blocks_override": 4,
        "max_model_len": 64,
    }
    with engine(family, root, modules, steering, **small, **options) as llm:
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        preempt = Mock(wraps=scheduler._preempt_request)
        scheduler._preempt_request = preempt
        yield llm
    assert preempt.call_count > 3


def runner(llm: LLM) -> Any:
    """The engine's model runner."""
    core = llm.llm_engine.engine_core.engine_core
    return core.model_executor.driver_worker.worker.model_runner


def params(max_tokens: int, **specs: Any) -> SamplingParams:
    """Greedy sampling with log-probabilities, and the request's steering specs."""
    return SamplingParams(
        temperature=0,
        max_tokens=max_tokens,
        logprobs=0,
        ignore_eos=True,
        detokenize=False,
        extra_args=specs or None,
    )


def generate(
    llm: LLM, prompts: Sequence[list[int]], sampling: Sequence[SamplingParams]
) -> list[Greedy]:
    """The engine's answer to each prompt, in one batch."""
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = llm.generate(inputs, list(sampling), use_tqdm=False)
    return [answer_of(output) for output in outputs]


def answer_of(output: RequestOutput) -> Greedy:
    """What a request got, and how likely each token was."""
    one = output.outputs[0]
    assert one.logprobs is not None
    steps = zip(one.logprobs, one.token_ids, strict=True)
    return Greedy(list(one.token_ids), [step[token].logprob for step, token in steps])


def sae_spec(
    module: str,
    clamps: Mapping[tuple[int, str], list[Clamp]] | None = None,
    phase: str = "both",
    spans: list[tuple[str, int, int | None]] | None = None,
) -> dict[str, Any]:
    """An SAE spec as a client writes it."""
    sites: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for (layer, hook), entries in (clamps or {}).items():
        sites.setdefault(hook, {})[layer] = [
            {
                "feature_idx": clamp.feature,
                "kind": clamp.kind,
                "value": clamp.value,
                "only_if_active": clamp.only_if_active,
                **when(clamp),
            }
            for clamp in entries
        ]
    return {"module_name": module, "clamps": sites, **coverage(phase, spans)}


def when(clamp: Clamp) -> dict[str, Any]:
    """The condition of a clamp, if it has one."""
    if clamp.when is None:
        return {}
    feature, which, bound = clamp.when
    return {"when": {"feature_idx": feature, which: bound}}


def coverage(
    phase: str, spans: list[tuple[str, int, int | None]] | None
) -> dict[str, Any]:
    """Where a spec acts: its phase, or its spans."""
    if spans is None:
        return {"phase": phase}
    keys = ("of", "start", "stop")
    return {"spans": [dict(zip(keys, span, strict=True)) for span in spans]}


def assert_same(found: Greedy, expected: Greedy, label: str = "") -> None:
    """Equal tokens, log-probabilities within 1e-4."""
    assert found.tokens == expected.tokens, label
    worst = max(
        abs(a - b) for a, b in zip(found.logprobs, expected.logprobs, strict=True)
    )
    assert worst < 1e-4, f"{label}: log-probabilities differ by {worst}"


@contextmanager
def restored(cls: type) -> Iterator[None]:
    """Undo what the Transformers backend does to a class that the oracle needs: it
    makes the library's own model class compile itself."""
    bases, before = cls.__bases__, dict(vars(cls))
    try:
        yield
    finally:
        cls.__bases__ = bases
        for name in set(vars(cls)) - set(before):
            delattr(cls, name)
        for name, value in before.items():
            if vars(cls)[name] is not value:
                setattr(cls, name, value)
