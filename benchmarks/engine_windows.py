# SPDX-License-Identifier: Apache-2.0
"""One mode's turn: a batch that decodes, or a step that prefills."""

from __future__ import annotations

import itertools
import time
from typing import Any

import torch
from engine_modes import (
    PREFILL_COUNT,
    PREFILL_LENGTH,
    PROMPT,
    random_prompts,
    sampling,
)
from engine_timing import Mode, Window, checked

WARM_STEPS, WALL_STEPS, GPU_STEPS, LAST_STEPS = 6, 32, 10, 3

_IDS = itertools.count()


def add_requests(mode: Mode, prompts: list[Any], max_tokens: int) -> None:
    """Hand the engine a batch of requests."""
    params = sampling(max_tokens, mode.specs)
    for prompt in prompts:
        mode.engine.llm.llm_engine.add_request(f"bench-{next(_IDS)}", prompt, params)


def finish(mode: Mode, count: int, max_tokens: int) -> None:
    """Step until all `count` requests have ended; each with all its tokens."""
    lengths = []
    while mode.engine.llm.llm_engine.has_unfinished_requests():
        for output in mode.engine.step():
            lengths.append(len(output.outputs[0].token_ids))
    if lengths != [max_tokens] * count:
        raise RuntimeError(f"{mode.name}: wrong number of tokens came back: {lengths}")


def decode_window(
    mode: Mode,
    batch: int,
    seed: int,
    wall_steps: int = WALL_STEPS,
    gpu_steps: int = GPU_STEPS,
) -> Window:
    """Start `batch` requests, let all decode, and time steps by every clock.

    Where the engine has a `HostProbe`, half of the wall steps more are timed by it.
    """
    engine, launched = mode.engine, mode.engine.probe.launched
    host_steps = wall_steps // 2 if engine.host else 0
    timed = wall_steps + host_steps + gpu_steps
    max_tokens = 1 + WARM_STEPS + timed + LAST_STEPS
    prompts = random_prompts(seed, batch, PROMPT)
    least = batch * (PROMPT + max_tokens - 1) if mode.specs else 0
    window = Window()
    torch.cuda.synchronize()
    with checked(mode, least):
        begin = len(launched)
        add_requests(mode, prompts, max_tokens)
        while launched[begin:][-WARM_STEPS:] != [batch] * WARM_STEPS:
            if not engine.llm.llm_engine.has_unfinished_requests():
                raise RuntimeError(f"{mode.name}: never all decoded")
            engine.step()
        begin, last = len(launched), time.perf_counter()
        for _ in range(wall_steps):
            engine.step()
            now = time.perf_counter()
            window.wall.append((now - last) * 1e3)
            last = now
        if engine.host is not None:
            with engine.host.watching():
                for _ in range(host_steps):
                    engine.step()
                    window.host.append(engine.host.take())
        if launched[begin:] != [batch] * (wall_steps + host_steps):
            raise RuntimeError(f"{mode.name}: not only decodes: {launched[begin:]}")
        with engine.probe.gpu_times() as window.gpu:
            for _ in range(gpu_steps):
                engine.step()
        finish(mode, batch, max_tokens)
    return window


def prefill_window(mode: Mode, seed: int) -> Window:
    """Time eight prompts of 1024 tokens, one step: admission to first tokens.

    The host's own work includes their admission.
    """
    count, length = PREFILL_COUNT, PREFILL_LENGTH
    window, host = Window(), mode.engine.host
    for at, clock in enumerate(("wall", "host", "gpu") if host else ("wall", "gpu")):
        prompts = random_prompts(3 * seed + at, count, length)
        torch.cuda.synchronize()
        with checked(mode, count * length if mode.specs else 0):
            if clock == "gpu":
                with mode.engine.probe.gpu_times() as times:
                    add_requests(mode, prompts, 1)
                    finish(mode, count, 1)
                window.gpu.append(sum(times))
            elif clock == "host":
                assert host is not None
                with host.watching():
                    begin = time.perf_counter()
                    add_requests(mode, prompts, 1)
                    admission = (time.perf_counter() - begin) * 1e3
                    finish(mode, count, 1)
                window.host.append(admission + host.take())
            else:
                begin = time.perf_counter()
                add_requests(mode, prompts, 1)
                finish(mode, count, 1)
                window.wall.append((time.perf_counter() - begin) * 1e3)
    return window


def measure_window(mode: Mode, phase: str, batch: int, seed: int) -> Window:
    """One turn of a mode: a batch that decodes, or a prefill."""
    if phase == "prefill":
        return prefill_window(mode, seed)
    return decode_window(mode, batch, seed)
