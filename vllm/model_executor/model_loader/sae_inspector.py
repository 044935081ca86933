# SPDX-License-Identifier: Apache-2.0
"""Inspect modules that a client named in another process, with limits.

The engine core must not parse files that it does not trust. A parser may use all time
or memory, or end the process. `ModuleInspector` keeps one helper process
(`sae_inspector_process.py`) that forks a child for each module; the child has limits on
time and memory and replies with one JSON object.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from typing import IO, Any

from vllm.config.steering import ModuleInfo
from vllm.config.steering_json import Json, JsonView
from vllm.model_executor.model_loader.sae_loader import (
    LocatedModule,
    ModuleOptions,
    locate,
)

PROCESS = "vllm.model_executor.model_loader.sae_inspector_process"
# Importing torch and vLLM, once.
START_SECONDS = 120.0
# Seconds beyond a child's own limits after which the helper is stopped.
GRACE_SECONDS = 15.0


@dataclass(frozen=True)
class InspectionLimits:
    """Limits of one inspection.

    `seconds` limits the reading of configurations and headers. Hashing the weight files
    may take the same time again, plus their size divided by `bytes_per_second`.
    `memory_bytes` limits what the child allocates.
    """

    seconds: float = 20.0
    memory_bytes: int = 1 << 30
    bytes_per_second: float = 50e6
    module_bytes: int = 1 << 40

    def hashing_seconds(self, size: int) -> float:
        """The limit for hashing files of `size` bytes in all."""
        return self.seconds + size / self.bytes_per_second


class PipeLines:
    """Reads whole lines from a pipe, with a time limit for each."""

    def __init__(self, number: int):
        self._number = number
        self._buffer = b""

    def next(self, seconds: float) -> bytes:
        """The next line; empty if the pipe ended or the time is over."""
        deadline = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            left = max(0.0, deadline - time.monotonic())
            ready, _, _ = select.select([self._number], [], [], left)
            part = os.read(self._number, 1 << 16) if ready else b""
            if not part:
                return b""
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line + b"\n"

    def close(self) -> None:
        """Close the pipe."""
        os.close(self._number)


class ModuleInspector:
    """Runs `inspect_module` in a process of its own. Thread-safe; one at a time."""

    def __init__(self, limits: InspectionLimits | None = None):
        self.limits = limits or InspectionLimits()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._to: IO[bytes] | None = None
        self._from: PipeLines | None = None

    def inspect(self, name: str, path: str, **options: Any) -> ModuleInfo:
        """As `inspect_module`; fetching from the Hub happens in this process.

        Raises:
            ValueError: one line: the module is refused, or inspecting it took more
                than the limits allow.
        """
        found = locate(name, path)
        with self._lock:
            reply = self._ask(_job(name, found, ModuleOptions(**options), self.limits))
        if "error" in reply:
            raise ValueError(reply["error"])
        return ModuleInfo.from_json(reply["module"])

    def close(self) -> None:
        """End the helper process."""
        with self._lock:
            self._stop()

    def _ask(self, job: JsonView) -> Json:
        prefix = f"steering module {job['name']!r} ({job['path']})"
        # Try twice, because something may have ended the helper.
        for _ in range(2):
            with contextlib.suppress(BrokenPipeError, EOFError):
                self._start()
                assert self._to is not None
                self._to.write(json.dumps(job).encode() + b"\n")
                self._to.flush()
                return self._reply()
            self._stop()
        return {"error": f"{prefix}: the inspecting process ends at once"}

    def _reply(self) -> Json:
        longest = self.limits.hashing_seconds(self.limits.module_bytes)
        line = self._line(self.limits.seconds + GRACE_SECONDS)
        if line.startswith(b'{"hashing"'):
            seconds = min(json.loads(line)["seconds"], longest)
            line = self._line(seconds + GRACE_SECONDS)
        if not line:
            raise EOFError
        return json.loads(line)

    def _line(self, seconds: float) -> bytes:
        """The helper's next line; empty if it ended or wrote nothing in time."""
        assert self._from is not None
        return self._from.next(seconds)

    def _start(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        self._stop()
        job_end, self_to = os.pipe()
        self_from, reply_end = os.pipe()
        # No GPU: the helper only reads files.
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        self._process = subprocess.Popen(
            [sys.executable, "-m", PROCESS, str(job_end), str(reply_end)],
            pass_fds=(job_end, reply_end),
            stdin=subprocess.DEVNULL,
            env=environment,
        )
        os.close(job_end)
        os.close(reply_end)
        self._to, self._from = os.fdopen(self_to, "wb"), PipeLines(self_from)
        if self._line(START_SECONDS) != b"ready\n":
            raise EOFError

    def _stop(self) -> None:
        for stream in (self._to, self._from):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = self._to = self._from = None


def _job(
    name: str, found: LocatedModule, options: ModuleOptions, limits: InspectionLimits
) -> Json:
    return {
        "name": name,
        "path": found.path,
        "pinned": found.pinned,
        "root": str(found.location.root),
        "origin": found.location.origin,
        "overrides": asdict(found.location.overrides),
        "options": asdict(options),
        "limits": asdict(limits),
    }
