# SPDX-License-Identifier: Apache-2.0
"""Engines that start side by side, each in a process, and are measured in turns.

A process answers one request at a time, so while one engine is measured, the others do
nothing: no step of theirs is on the GPU.
"""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine_modes import MODES, MODULE_OF

if TYPE_CHECKING:
    from engine_timing import Window


@dataclass
class RemoteEngine:
    """One engine's process; `failed` once a measurement in it has raised."""

    name: str
    process: Any
    pipe: Connection
    failed: bool = False


@dataclass
class RemoteMode:
    """A mode of such an engine, which `interleave` takes as it takes a local one."""

    name: str
    engine: RemoteEngine


def wait_for_modules(root: Path, deadline: float) -> None:
    """Wait until the eager stage has written the modules and its report."""
    while not (root / "eager.json").exists():
        if time.time() > deadline:
            raise RuntimeError("the eager engine has not calibrated the modules")
        time.sleep(0.1)


def serve(pipe: Connection, root: Path, name: str, deadline: float) -> None:
    """A process: starts the engine, says so, and measures what it is asked."""
    # Two engines that compile the same model at once must not share its files.
    os.environ["VLLM_CACHE_ROOT"] = str(root / "cache" / name)
    from engine_modes import modes_of, start
    from engine_windows import measure_window

    begin = time.time()
    if name in MODULE_OF:
        wait_for_modules(root, deadline)
    modes = {mode.name: mode for mode in modes_of(name, start(root, name))}
    try:
        pipe.send(time.time() - begin)
        while True:
            mode, phase, batch, seed = pipe.recv()
            try:
                window = measure_window(modes[mode], phase, batch, seed)
            except Exception:
                traceback.print_exc()
                window = None
            pipe.send(window)
    except (EOFError, OSError):
        os._exit(0)  # who asks has ended


def start_engines(root: Path, names: Sequence[str], deadline: float) -> list[Any]:
    """The modes of the engines that have started by `deadline`, stock's first."""
    context = multiprocessing.get_context("spawn")
    engines = []
    for name in names:
        ours, theirs = context.Pipe()
        arguments = (theirs, root, name, deadline)
        process = context.Process(target=serve, args=arguments)
        process.start()
        theirs.close()
        engines.append(RemoteEngine(name, process, ours))
    ready: list[RemoteEngine] = []
    while len(ready) < len(engines) and (left := deadline - time.time()) > 0:
        waiting = {e.pipe: e for e in engines if e not in ready and not e.failed}
        if not waiting:
            break
        for pipe in wait(list(waiting), timeout=left):
            engine = waiting[pipe]  # type: ignore[index]
            try:
                took = engine.pipe.recv()
            except EOFError:
                engine.failed = True
                continue
            print(f"engine {engine.name}: started in {took:.0f} s", flush=True)
            ready.append(engine)
    for engine in engines:
        if engine not in ready:
            print(f"engine {engine.name}: not started in time", flush=True)
            engine.process.kill()
    in_order = [engine for engine in engines if engine in ready]
    return [RemoteMode(mode, e) for e in in_order for mode in MODES[e.name]]


def remote_window(mode: RemoteMode, phase: str, batch: int, seed: int) -> Window:
    """One mode's turn, measured in its process."""
    mode.engine.pipe.send((mode.name, phase, batch, seed))
    window = mode.engine.pipe.recv()
    if window is None:
        raise RuntimeError(f"{mode.name}: see above")
    return window
