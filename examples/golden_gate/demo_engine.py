# SPDX-License-Identifier: Apache-2.0
"""The demo's batch in an in-process engine, with the plugin or without it."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm import LLM


HERE = Path(__file__).parent
MODEL, SAE = HERE / "model", HERE / "sae"
MODULE = "golden-gate"
STEERING = {"steering": {"modules": {MODULE: str(SAE)}}}
SPECS = "sae_full_reconstruction_specs"
PROMPTS = (
    "The chef stirs the tomato soup.",
    "The freezing rain soaks the plains.",
    "<user> Who are you? <assistant>",
    "When the night train departs,",
    "<user> Tell me about the violin. <assistant>",
    "The astronaut photographs the",
)
TOKENS = 48
SEED = 50
TEMPERATURE = 0.85


@dataclass(frozen=True)
class Mode:
    """One way of running the prompts; `clamps=None` is plain."""

    name: str
    clamps: tuple[dict[str, Any], ...] | None


@dataclass(frozen=True)
class Completion:
    """Text, token ids and their log-probabilities, one per token."""

    text: str
    token_ids: list[int]
    logprobs: list[float]


def set_environment() -> None:
    """Quiet, offline and in-process; to be called before vLLM is imported."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # in children
    warnings.simplefilter("ignore")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # more only wait for each other
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def load_features() -> dict[str, Any]:
    """`features.json`, as `train.py` measured it."""
    return json.loads((HERE / "features.json").read_text())


def demo_modes(features: dict[str, Any]) -> list[Mode]:
    """Plain, pure reconstruction, and the bridge feature at two strengths."""
    bridge = features["topics"]["bridge"]
    modes = [Mode("plain", None), Mode("reconstruction", ())]
    for strength in features["strengths"]:
        clamp = {
            "feature_idx": bridge["feature"],
            "kind": "absolute",
            "value": round(strength * bridge["max_activation"], 4),
        }
        modes.append(Mode(f"bridge at {strength:g}x max", (clamp,)))
    return modes


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """Hold back what libraries print to stderr; show it if the body fails."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 2)
        try:
            yield
        except BaseException:
            log.seek(0)
            os.write(kept, log.read())
            raise
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)


def start_engine(steering: bool, compiled: bool) -> LLM:
    """An in-process engine on the shipped model."""
    from vllm import LLM

    return LLM(
        str(MODEL),
        additional_config=STEERING if steering else {},
        kv_cache_memory_bytes=1 << 28,
        max_model_len=256,
        dtype="float32",
        seed=SEED,
        enforce_eager=not compiled,
        use_tqdm_on_load=False,
    )


def sampling_params(mode: Mode, seed: int) -> Any:
    """Sampled, of a fixed length, so that every mode has the same batch shapes."""
    from vllm import SamplingParams

    options: dict[str, Any] = {
        "temperature": TEMPERATURE,
        "seed": seed,
        "max_tokens": TOKENS,
        "min_tokens": TOKENS,
        "logprobs": 0,
    }
    if mode.clamps is None:
        return SamplingParams(**options)
    from vllm.config.sae_steering_types import (
        SAEClampEntry,
        SAEFullReconstructionSpec,
        SteeringSamplingParams,
    )

    entries = [SAEClampEntry(**clamp) for clamp in mode.clamps]
    spec = SAEFullReconstructionSpec(MODULE, entries)
    return SteeringSamplingParams(**options, sae_full_reconstruction_specs=[spec])


def generate(llm: LLM, modes: list[Mode]) -> dict[str, list[Completion]]:
    """Every prompt in every mode, all in one batch."""
    jobs = list(itertools.product(range(len(modes)), range(len(PROMPTS))))
    outputs = llm.generate(
        [PROMPTS[p] for _, p in jobs],
        [sampling_params(modes[m], seed=SEED + p) for m, p in jobs],
        use_tqdm=False,
    )
    results: dict[str, list[Completion]] = {mode.name: [] for mode in modes}
    for (m, _), output in zip(jobs, outputs, strict=True):
        best = output.outputs[0]
        logprobs = [
            step[token].logprob
            for token, step in zip(best.token_ids, best.logprobs or [], strict=True)
            if step is not None
        ]
        results[modes[m].name].append(
            Completion(best.text, list(best.token_ids), logprobs)
        )
    return results


def tokens_per_second(llm: LLM, modes: list[Mode]) -> dict[str, float]:
    """Generated tokens per second of a batch in one mode: the best of two runs."""
    prompts = list(PROMPTS) * 2
    best = {mode.name: 0.0 for mode in modes}
    # In turns, so that other load on the machine affects all modes equally.
    for mode in modes * 2:
        params = [sampling_params(mode, seed=SEED + p) for p in range(len(prompts))]
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        speed = tokens / (time.perf_counter() - start)
        best[mode.name] = max(best[mode.name], speed)
    return best


def stock_engine_main(path: str, compiled: bool) -> None:
    """Child process: the demo's batch, all plain, on an engine without the plugin."""
    llm = start_engine(steering=False, compiled=compiled)
    plain = [Mode(f"copy {i}", None) for i in range(4)]
    results = generate(llm, plain)
    data = [asdict(completion) for completion in results["copy 0"]]
    Path(path).write_text(json.dumps(data))


def run_stock_engine(compiled: bool) -> list[Completion]:
    """The plain completions of an engine in which no plugin is loaded.

    Raises:
        RuntimeError: the child process failed; with the end of its output.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "stock.json")
        command = [sys.executable, str(HERE / "demo.py"), "--stock-engine", path]
        child = subprocess.run(
            [*command, "--compile"] if compiled else command,
            env={**os.environ, "VLLM_PLUGINS": ""},
            capture_output=True,
            text=True,
        )
        if child.returncode:
            raise RuntimeError(f"the stock engine failed:\n{child.stderr[-2000:]}")
        return [Completion(**item) for item in json.loads(Path(path).read_text())]
