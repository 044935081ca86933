# SPDX-License-Identifier: Apache-2.0
"""The engines of `bench_tp.py`, each in a process of its own."""

from __future__ import annotations

import argparse
import multiprocessing
import time
from dataclasses import dataclass, field, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from tp_engine import READY, Start, serve
from tp_shapes import SHAPES, write_files

TWINS = "+twins"  # ends the name of an engine with graphs for idle steps
# name -> (folder, `sharding`)
MODULES = {
    "one shared": ("one", "shard"),
    "one copied": ("one", "replicate"),
    "four shared": ("four", "shard"),
}
Row = dict[str, Any]


@dataclass
class Engine:
    """An engine's process, and the end of the pipe to it."""

    name: str
    process: Any
    pipe: Any
    start: Start
    facts: Row = field(default_factory=dict)
    failed: bool = False

    def answer(self, seconds: float) -> Any:
        """What the process sends next.

        Raises:
            RuntimeError: it failed, ended, or was silent for so long.
        """
        try:
            good, result = self.pipe.recv() if self.pipe.poll(seconds) else (False, "")
        except EOFError:
            good, result = False, "it ended"
        if not good:
            self.failed = True
            self.process.kill()
            raise RuntimeError(f"{self.name}: {result or 'no answer in time'}")
        return result


def modules_of(engine: str, args: argparse.Namespace) -> dict[str, tuple[str, str]]:
    """The modules of an engine."""
    if engine == "stock":
        return {}
    gathers = engine.removesuffix(TWINS) == "gather"
    asked = ["one shared"] if gathers else args.modules
    four = bool(SHAPES[args.shape].sites)
    return {name: MODULES[name] for name in asked if four or name != "four shared"}


def await_file(path: Path | None) -> None:
    """Return once the file exists, if one is given."""
    while path is not None and not path.exists():
        time.sleep(0.2)


def start_engine(start: Start) -> Engine:
    """Start a process; the engine is not ready yet."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(start, theirs))
    process.start()
    theirs.close()
    return Engine(start.name, process, ours, start)


def start_engines(args: argparse.Namespace, root: Path) -> list[Engine]:
    """Start the processes; write the files while they load their libraries."""
    engines = [
        start_engine(
            Start(
                name=name,
                root=str(root),
                shape=args.shape,
                tp=args.tp,
                modules=modules_of(name, args),
                peers=name.removesuffix(TWINS) == "peers",
                twins=name.endswith(TWINS),
                dry_run=args.dry_run,
                kv_gib=args.kv_gib,
                delay=args.apart * i,
            )
        )
        for i, name in enumerate(args.engines)
    ]
    if not (root / READY).exists():
        # In a process of its own, whose memory of the GPU is then free again.
        context = multiprocessing.get_context("spawn")
        writer = context.Process(target=write_files, args=(root, SHAPES[args.shape]))
        writer.start()
        writer.join()
        if writer.exitcode:
            raise RuntimeError("the model's files could not be written")
        await_file(args.hold)
        (root / READY).touch()
    return engines


def wait_for(engines: list[Engine], deadline: float) -> list[Engine]:
    """Those that started in time, with their facts, in the same order.

    One that fails with several modules is started once more with the first alone.
    """
    waiting = {engine.pipe: engine for engine in engines}
    started: dict[str, Engine] = {}
    while waiting and (left := deadline - time.time()) > 0:
        for pipe in wait(list(waiting), left):
            engine = waiting.pop(pipe)
            try:
                engine.facts = engine.answer(0)
            except RuntimeError as error:
                print(str(error)[-1500:], flush=True)
                if len(engine.start.modules) > 1:
                    few = dict(list(engine.start.modules.items())[:1])
                    again = start_engine(replace(engine.start, modules=few, delay=0))
                    waiting[again.pipe] = again
                continue
            print(f"{engine.name}: {engine.facts}", flush=True)
            started[engine.name] = engine
    for engine in waiting.values():
        print(f"{engine.name}: did not start in time", flush=True)
        engine.process.kill()
    return [started[engine.name] for engine in engines if engine.name in started]
