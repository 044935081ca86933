# SPDX-License-Identifier: Apache-2.0
"""One engine of `bench_tp.py`: a process that starts it and measures when asked."""

from __future__ import annotations

import os
import random
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tp_shapes import HOOK, SHAPES

FULL_KEY = "sae_full_reconstruction_specs"
CLAMP = {"feature_idx": 11, "kind": "absolute", "value": 1.0}
PROMPT = 32
WARM_STEPS, LAST_STEPS = 4, 2
READY = "ready"  # a file that says that model and modules are written


@dataclass(frozen=True)
class Start:
    """How an engine is started.

    Attributes:
        modules: name -> (folder of the module, `sharding`).
        peers: whether shared SAEs go through peers' memory.
        twins: whether idle steps have CUDA graphs without steering.
        kv_gib: of each rank's KV cache.
        delay: seconds to wait before the start.
    """

    name: str
    root: str
    shape: str
    tp: int
    modules: dict[str, tuple[str, str]]
    peers: bool
    twins: bool
    dry_run: bool
    kv_gib: float = 3
    delay: float = 0


@dataclass(frozen=True)
class Turn:
    """What to measure: a batch, by requests of one module (None: no steering)."""

    module: str | None
    batch: int
    length: int  # of the prompts
    steps: int  # 0: a prefill
    seed: int


def options(start: Start) -> dict[str, Any]:
    """The same for every engine."""
    dry = start.dry_run
    steering: dict[str, Any] = {"modules": {}, "readout": False}
    for name, (folder, sharding) in start.modules.items():
        path = str(Path(start.root) / folder)
        steering["modules"][name] = {"path": path, "sharding": sharding}
    return {
        "model": str(Path(start.root) / "model"),
        "additional_config": {"steering": steering} if start.modules else {},
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": "bfloat16",
        "max_model_len": 128 if dry else 2048,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 2048 if dry else 8192,
        "kv_cache_memory_bytes": (1 << 26) if dry else int(start.kv_gib * 2**30),
        "gpu_memory_utilization": 0.1,
        "enable_prefix_caching": False,
        "tensor_parallel_size": start.tp,
        "distributed_executor_backend": "mp",
        "worker_extension_cls": "tp_worker.StepTimer",
        "compilation_config": {"cudagraph_capture_sizes": [1, 64]},
        "enforce_eager": dry,
    }


@dataclass(frozen=True)
class Profile:
    """Ask for the kernels that the first rank runs while it serves a batch."""

    module: str | None
    batch: int
    tokens: int


class Bench:
    """A running engine and its watched ranks."""

    def __init__(self, start: Start):
        from vllm import LLM

        while not (Path(start.root) / READY).exists():
            time.sleep(0.2)
        time.sleep(start.delay)
        begin = time.perf_counter()
        self.llm = LLM(**options(start))
        self.shape, self.modules = SHAPES[start.shape], start.modules
        config = self.llm.llm_engine.vllm_config
        ranks = self.llm.collective_rpc(
            "watch_steps", args=(start.root, start.shape), timeout=120
        )
        self.facts = {
            **ranks[0],
            "start_s": round(time.perf_counter() - begin),
            "async_scheduling": config.scheduler_config.async_scheduling,
        }

    def spec(self, module: str) -> dict[str, Any]:
        """Full reconstruction at all sites of a module, with a clamp at each."""
        (folder, _) = self.modules[module]
        layers = self.shape.sites if folder == "four" else (self.shape.site,)
        clamps = {HOOK: {layer: [CLAMP] for layer in layers}}
        return {"module_name": module, "clamps": clamps}

    def run(self, turn: Turn, tokens: int) -> None:
        """Let the engine serve a batch to its end."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        rng = random.Random(turn.seed)
        params = SamplingParams(
            temperature=1.0,
            max_tokens=tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args={FULL_KEY: [self.spec(turn.module)]} if turn.module else None,
        )
        engine = self.llm.llm_engine
        for i in range(turn.batch):
            ids = rng.choices(range(3, self.shape.vocab), k=turn.length)
            engine.add_request(f"{turn.seed}-{i}", {"prompt_token_ids": ids}, params)
        lengths = []
        while engine.has_unfinished_requests():
            for output in engine.step():
                lengths.append(len(output.outputs[0].token_ids))
        if lengths != [tokens] * turn.batch:
            raise RuntimeError(f"wrong numbers of tokens came back: {lengths}")

    def take(self, least: int) -> dict[str, list[float]]:
        """By clock, the milliseconds of each step: those of the slowest rank.

        Raises:
            RuntimeError: fewer than `least` tokens were steered (0: some were).
        """
        ranks = self.llm.collective_rpc("take_steps", timeout=60)
        for _, steered in ranks:
            if steered < least or (steered and not least):
                raise RuntimeError(f"{steered} tokens steered, expected {least}")
        found = {}
        for clock in ("gpu", "between", "host"):
            every = zip(*(times[clock] for times, _ in ranks), strict=True)
            found[clock] = [max(step) for step in every]
        return found

    def measure(self, turn: Turn) -> dict[str, list[float]]:
        """Milliseconds by clock: `steps` between, and as many inside."""
        if not turn.steps:
            return self.prefill(turn)
        expect = (turn.batch, WARM_STEPS, turn.steps, turn.steps)
        self.llm.collective_rpc("expect_steps", args=expect)
        tokens = 2 + WARM_STEPS + 2 * turn.steps + LAST_STEPS
        self.run(turn, tokens)
        return self.take(turn.batch * (turn.length + tokens - 1) * bool(turn.module))

    def profile(self, asked: Profile) -> dict[str, tuple[int, float]]:
        """Kernel -> how often it ran, and microseconds in all."""
        turn = Turn(asked.module, asked.batch, PROMPT, 0, -1)
        self.llm.collective_rpc("begin_profile")
        self.run(turn, asked.tokens)
        found: dict[str, tuple[int, float]] = self.llm.collective_rpc("end_profile")[0]
        return found

    def prefill(self, turn: Turn) -> dict[str, list[float]]:
        """One step with all prompts: inside, and another on the host's clock."""
        tokens = turn.batch * turn.length
        times: dict[str, list[float]] = {"gpu": [], "between": [], "host": []}
        for inside in (1, 0):
            self.llm.collective_rpc("expect_steps", args=(tokens, 0, 0, inside))
            begin = time.perf_counter()
            self.run(turn, 1)
            if not inside:
                times["host"].append((time.perf_counter() - begin) * 1e3)
            times["gpu"] += self.take(tokens * bool(turn.module))["gpu"]
        return times


def serve(start: Start, pipe: Connection) -> None:
    """The process: facts once the engine runs, then an answer to each turn.

    An answer is `(True, result)` or `(False, what went wrong)`.
    """
    log = os.open(
        str(Path(start.root) / f"{start.name}.log"),
        os.O_WRONLY | os.O_CREAT | os.O_TRUNC,
    )
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    if start.dry_run:  # two ranks need not have two nodes of memory
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ["VLLM_STEERING_PEER_MEMORY"] = "1" if start.peers else "0"
    os.environ["VLLM_STEERING_IDLE_GRAPHS"] = "1" if start.twins else "0"
    here = str(Path(__file__).resolve().parent)
    paths = [here, *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)  # for the workers
    try:
        bench = Bench(start)
        pipe.send((True, bench.facts | {"engine": asdict(start)}))
        while (turn := pipe.recv()) is not None:
            measure = bench.profile if isinstance(turn, Profile) else bench.measure
            pipe.send((True, measure(turn)))
    except EOFError:
        pass  # the other process has ended
    except Exception:
        traceback.print_exc()
        pipe.send((False, traceback.format_exc()))
    sys.stdout.flush()
    os._exit(0)  # tearing down takes time and has no use here
