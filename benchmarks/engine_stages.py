# SPDX-License-Identifier: Apache-2.0
"""What each stage of `bench_engine.py` does in its process."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from facts import environment

BATCHES = (64, 256, 1)  # of decoding
PREFILL = "prefill"
ALL_BATCHES = (*map(str, BATCHES), PREFILL)
ROUNDS, EAGER_ROUNDS = 24, 1
HF_BATCH, HF_TOKENS = 64, 128
MEASURE_SECONDS = 30  # that measuring takes at least
HF_MODE = "hugging face + hook"
Row = dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """Which engines and batches.

    hurry: the eager engine only calibrates, and the others start in processes.
    """

    engines: Sequence[str]
    batches: Sequence[str]
    hurry: bool


class Report:
    """Rows of one stage's process, saved to a file whenever some are added."""

    def __init__(self, path: Path):
        self.path = path
        self.rows: list[Row] = []

    def add(self, rows: list[Row]) -> None:
        self.rows += rows
        for row in rows:
            print(row, flush=True)
        content = {"rows": self.rows, "environment": environment()}
        fresh = self.path.with_suffix(".tmp")
        fresh.write_text(json.dumps(content))
        fresh.replace(self.path)


def run_eager(root: Path, deadline: float, report: Report, asked: Asked) -> None:
    """Calibrate on an eager engine, then time it."""
    from engine_calibration import calibrate
    from engine_modes import modes_of, start
    from engine_windows import measure_window

    engine = start(root, "eager")
    report.add(calibrate(root, engine))
    if not asked.hurry:
        modes = modes_of("eager", engine)
        measure(modes, EAGER_ROUNDS, deadline, report, asked.batches, measure_window)


def run_engines(
    root: Path, deadline: float, report: Report, names: Sequence[str], asked: Asked
) -> None:
    """Start the engines, as many as there is time for, and let them take turns."""
    from engine_windows import measure_window

    if asked.hurry:
        from engine_processes import remote_window, start_engines

        modes = start_engines(root, names, deadline - MEASURE_SECONDS)
        window = remote_window
    else:
        modes, window = start_together(root, deadline, names), measure_window
    if not modes:
        raise RuntimeError("no engine could be started")
    measure(modes, ROUNDS, deadline, report, asked.batches, window)
    if asked.hurry:
        for mode in modes:
            mode.engine.process.kill()


def start_together(root: Path, deadline: float, names: Sequence[str]) -> list[Any]:
    """The modes of the engines that this process has time to start."""
    from engine_modes import modes_of, start

    modes: list[Any] = []
    took = 0.0
    for name in names:
        begin = time.time()
        # The first one also imported everything.
        expected = took if len(modes) > 1 else took / 2
        if modes and begin + expected + MEASURE_SECONDS > deadline:
            print(f"engine {name}: no time to start it", flush=True)
            break
        try:
            modes += modes_of(name, start(root, name))
        except Exception:
            traceback.print_exc()
            continue
        took = time.time() - begin
        print(f"engine {name}: started in {took:.0f} s", flush=True)
    return modes


def measure(
    modes: list[Any],
    rounds: int,
    deadline: float,
    report: Report,
    batches: Sequence[str],
    window: Callable[[Any, str, int, int], Any],
) -> None:
    """Decode at every batch size, or prefill; time is shared out evenly.

    `window` measures one turn of a mode: phase, batch, seed.
    """
    from engine_modes import PREFILL_COUNT, PREFILL_LENGTH
    from engine_timing import interleave, summarize

    for done, asked in enumerate(batches):
        begin = time.time()
        until = begin + (deadline - begin) / (len(batches) - done)
        phase, batch, tokens = PREFILL, PREFILL_COUNT, PREFILL_COUNT * PREFILL_LENGTH
        if asked != PREFILL:
            phase, batch, tokens = "decode", int(asked), int(asked)

        def turn(mode: Any, seed: int, phase: str = phase, batch: int = batch) -> Any:
            return window(mode, phase, batch, seed)

        found = interleave(modes, turn, rounds, until)
        report.add(summarize(found, phase, batch, tokens))
        print(f"{phase} {batch}: {time.time() - begin:.0f} s", flush=True)


def run_hf(root: Path, deadline: float, report: Report) -> None:
    """Hugging Face `generate` with a forward hook, as in a notebook.

    The hook reconstructs all tokens in the model's dtype by two dense products, and
    clamps a feature. Prompts are fixed; the rate includes their prefill.
    """
    import torch
    import transformers
    from engine_modes import CLAMP, CONFIG, PROMPT, SITE_LAYERS
    from safetensors.torch import load_file

    values = {key: value for key, value in CONFIG.items() if key != "architectures"}
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.Gemma2Config(**values), dtype=torch.bfloat16
        ).eval()
    (layer,) = SITE_LAYERS["one"]
    (site,) = json.loads((root / "one" / "manifest.json").read_text())["sites"]
    file = root / "one" / site["file"]
    sae = {
        name: value.to(torch.bfloat16)
        for name, value in load_file(file, device="cuda").items()
    }

    def hook(module: Any, args: Any, out: Any) -> Any:
        x = out[0] if isinstance(out, tuple) else out
        p = x @ sae["W_enc"].T + sae["b_enc"]
        f = p * (p > sae["threshold"])
        f[..., CLAMP["feature_idx"]] = CLAMP["value"]
        new = f @ sae["W_dec"] + sae["b_dec"]
        return (new, *out[1:]) if isinstance(out, tuple) else new

    model.model.layers[layer].register_forward_hook(hook)
    ids = torch.randint(3, CONFIG["vocab_size"], (HF_BATCH, PROMPT), device="cuda")
    seconds = []
    for count in (8, HF_TOKENS, HF_TOKENS):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                ids, max_new_tokens=count, min_new_tokens=count, do_sample=True
            )
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
        assert out.shape == (HF_BATCH, PROMPT + count)
        if count == HF_TOKENS:
            best = min(seconds[1:])
            row = {"mode": HF_MODE, "phase": "decode", "batch": HF_BATCH}
            row["step_ms_wall"] = round(best / count * 1e3, 3)
            row["tokens_per_s"] = round(HF_BATCH * count / best, 1)
            report.rows.clear()
            report.add([row])
        if time.time() + 2 * seconds[-1] > deadline:
            break


def run_stage(stage: str, root: Path, deadline: float, asked: Asked) -> None:
    """The body of a stage's process; does not return."""
    report = Report(root / f"{stage}.json")
    code = 0
    try:
        if stage == "eager":
            run_eager(root, deadline, report, asked)
        elif stage == "hf":
            run_hf(root, deadline, report)
        else:
            _, _, name = stage.partition("-")
            names = (name,) if name else asked.engines
            run_engines(root, deadline, report, names, asked)
    except Exception:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Tearing down several engines takes time and has no use here.
    os._exit(code)
