# SPDX-License-Identifier: Apache-2.0
"""What reading features costs the host: microseconds a step, on any CPU.

    python benchmarks/bench_readout_host.py [--batch 256] [--steps 64] [--prefill]
        [--out FILE]

The demo model decodes with `--batch` requests in one process. In turn nobody reads and
every request reads its 16 largest activations. Timed are the functions of a step that
reading is part of:

- `prepare`: the worker's rows and index (`prepare_steering`);
- `take`: the worker's copy of what was read (`take_steering_readout`);
- `scheduler`: `Scheduler.update_from_output`;
- `encode`, `decode`: the step's outputs to msgpack and back, as between the engine's
  process and a front end;
- `front end`: `OutputProcessor.process_outputs`;
- `end`: the same of the steps in which requests end, for each request.

Figures are medians over the steps; `extra` is what reading adds. The model's own
forward is not in them.

With `--prefill`, 8 prompts of 1024 tokens are read in one step instead, and `admit` is
the admission of all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("prepare", "take", "scheduler", "encode", "decode", "front end")
IN_PROCESS = ("prepare", "take", "scheduler", "front end")
READ = [{"module_name": "golden-gate", "top_k": 16}]
PROMPT = 8
PREFILL_COUNT, PREFILL_LENGTH = 8, 1024

Times = dict[str, list[float]]


def start_engine(batch: int) -> Any:
    """The demo model with its SAE, for `batch` requests at once."""
    from vllm import LLM

    example = ROOT / "examples" / "golden_gate"
    return LLM(
        str(example / "model"),
        dtype="float32",
        max_model_len=PREFILL_LENGTH + 8,
        hf_overrides={"max_position_embeddings": PREFILL_LENGTH + 8},
        max_num_seqs=batch,
        max_num_batched_tokens=PREFILL_COUNT * PREFILL_LENGTH,
        enforce_eager=True,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=1 << 28,
        additional_config={
            "steering": {"modules": {"golden-gate": str(example / "sae")}}
        },
    )


@contextmanager
def timed(owner: Any, name: str, times: list[float]) -> Iterator[None]:
    """While the block runs: add the duration of each call of a method."""
    stock: Callable[..., Any] = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        result = stock(*args, **kwargs)
        times.append((time.perf_counter() - begin) * 1e6)
        return result

    setattr(owner, name, call)
    try:
        yield
    finally:
        delattr(owner, name)


def transport(outputs: Any, times: Times) -> None:
    """Time the outputs' way to another process and back."""
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    encoder, decoder = MsgpackEncoder(), MsgpackDecoder(EngineCoreOutputs)
    begin = time.perf_counter()
    data = encoder.encode(outputs)
    middle = time.perf_counter()
    decoder.decode(data)
    times["encode"].append((middle - begin) * 1e6)
    times["decode"].append((time.perf_counter() - middle) * 1e6)


def window(llm: Any, batch: int, steps: int, extra: dict[str, Any] | None) -> Times:
    """Start `batch` requests, time `steps` steps in which all decode, and the end."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        temperature=0,
        max_tokens=steps + 4,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args=extra,
    )
    engine = llm.llm_engine
    core = engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    for at in range(batch):
        ids = [3 + (at * 7 + place * 5) % 200 for place in range(PROMPT)]
        prompt = {"prompt_token_ids": ids}
        engine.add_request(f"bench-{time.perf_counter_ns()}-{at}", prompt, params)
    for _ in range(3):
        engine.step()
    times: Times = {name: [] for name in (*PARTS, "end")}

    def encoded(outputs: Any) -> None:
        for of_client in outputs.values():
            transport(of_client, times)

    stock = core.scheduler.update_from_output
    front = engine.output_processor
    with (
        timed(runner, "prepare_steering", times["prepare"]),
        timed(runner, "take_steering_readout", times["take"]),
        timed(front, "process_outputs", times["front end"]),
    ):
        for _ in range(steps):
            made: list[Any] = []

            def kept(*args: Any, made: list[Any] = made) -> Any:
                begin = time.perf_counter()
                found = stock(*args)
                times["scheduler"].append((time.perf_counter() - begin) * 1e6)
                made.append(found)
                encoded(found)
                return found

            core.scheduler.update_from_output = kept
            engine.step()
            del core.scheduler.update_from_output
    with timed(front, "process_outputs", times["end"]):
        while engine.has_unfinished_requests():
            engine.step()
    times["end"] = [max(times["end"]) / batch]
    return times


def prefill(llm: Any, extra: dict[str, Any] | None) -> Times:
    """Time one step that reads all prompts, from admission to the outputs."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        temperature=0,
        max_tokens=1,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args=extra,
    )
    engine = llm.llm_engine
    core = engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    times: Times = {name: [] for name in ("admit", *IN_PROCESS)}
    with (
        timed(engine, "add_request", times["admit"]),
        timed(runner, "prepare_steering", times["prepare"]),
        timed(runner, "take_steering_readout", times["take"]),
        timed(core.scheduler, "update_from_output", times["scheduler"]),
        timed(engine.output_processor, "process_outputs", times["front end"]),
    ):
        for at in range(PREFILL_COUNT):
            ids = [3 + (at * 7 + place * 5) % 200 for place in range(PREFILL_LENGTH)]
            prompt = {"prompt_token_ids": ids}
            engine.add_request(f"fill-{time.perf_counter_ns()}-{at}", prompt, params)
        while engine.has_unfinished_requests():
            engine.step()
    return {name: [sum(found)] for name, found in times.items()}


def measure_prefill(llm: Any, rounds: int) -> list[dict[str, Any]]:
    """A row for each part, in microseconds for all prompts."""
    specs = {"sae_readout_specs": READ}
    prefill(llm, specs)
    pairs = [(prefill(llm, None), prefill(llm, specs)) for _ in range(rounds)]
    rows = []
    for part in ("admit", *IN_PROCESS):
        a, b = (min(pair[side][part][0] for pair in pairs) for side in (0, 1))
        rows.append({"part": part, "idle": a, "reading": b, "extra": b - a})
    rows.append({"part": "in process", "extra": sum(row["extra"] for row in rows)})
    return rows


def measure(llm: Any, batch: int, steps: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each part: idle, reading and the difference, in microseconds."""
    idle: list[Times] = []
    reading: list[Times] = []
    window(llm, batch, steps, {"sae_readout_specs": READ})
    for _ in range(rounds):
        idle.append(window(llm, batch, steps, None))
        reading.append(window(llm, batch, steps, {"sae_readout_specs": READ}))

    def best(found: Sequence[Times], part: str) -> float:
        # The quietest window: other processes only add.
        return min(statistics.median(times[part]) for times in found)

    rows = []
    for part in (*PARTS, "end"):
        a, b = best(idle, part), best(reading, part)
        rows.append({"part": part, "idle": a, "reading": b, "extra": b - a})
    total = sum(row["extra"] for row in rows if row["part"] in IN_PROCESS)
    rows.append({"part": "in process", "extra": total, "request": total / batch})
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prefill", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    llm = start_engine(args.batch)
    if args.prefill:
        rows = measure_prefill(llm, args.rounds)
    else:
        rows = measure(llm, args.batch, args.steps, args.rounds)
    for row in rows:
        numbers = {k: round(v, 1) for k, v in row.items() if k != "part"}
        print(f"{row['part']:>10} {numbers}", flush=True)
    if args.out:
        args.out.write_text(json.dumps({"batch": args.batch, "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
