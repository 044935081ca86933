# SPDX-License-Identifier: Apache-2.0
"""Read the files of modules that a client named in another process, with limits.

An engine must not parse files that it does not trust: a parser may take all its time,
its memory, or the process with it. `ModuleInspector` keeps one helper process
(`sae_inspector_process.py`) that forks a child for each job; the child has a limit on
time and on memory. What it says is one JSON object, or the bytes of tensors whose sizes
are known beforehand.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import IO, Any

import torch

from vllm.config.steering import ModuleInfo, SiteInfo
from vllm.config.steering_json import Json, JsonView
from vllm.model_executor.layers.steering_shards import WHOLE, Shard
from vllm.model_executor.model_loader.sae_loader import ModuleOptions
from vllm.model_executor.model_loader.sae_location import LocatedModule, locate

PROCESS = "vllm.model_executor.model_loader.sae_inspector_process"
# Importing torch and vLLM, once.
START_SECONDS = 120.0
# Seconds beyond a child's own limits after which the helper is stopped.
GRACE_SECONDS = 15.0
PIPE_BYTES = 1 << 20
TOO_LONG = "its tensors were not read in the time allowed, or the process ended"


@dataclass(frozen=True)
class InspectionLimits:
    """What reading the files of one module may take.

    `seconds` bounds reading configurations and headers; hashing the weight files may
    take as long again and the time that `bytes_per_second` gives them, and so may
    loading them. `memory_bytes` bounds what the child allocates, beyond what it loads.
    """

    seconds: float = 20.0
    memory_bytes: int = 1 << 30
    bytes_per_second: float = 50e6
    module_bytes: int = 1 << 40

    def seconds_for(self, size: int) -> float:
        """The limit for hashing or loading `size` bytes."""
        return self.seconds + size / self.bytes_per_second


class PipeLines:
    """Reads whole lines from a pipe, with a time limit for each.

    Args:
        number: of the pipe's end that is read.
        asker: another one, from which the questions come that the lines answer.

    Attributes:
        unasked: whether a wait has ended because nobody can write to `asker` any more.
    """

    def __init__(self, number: int, asker: int | None = None):
        self._number = number
        self._buffer = b""
        # Not `select`, which takes no number above 1023.
        self._poll = select.poll()
        self._poll.register(number, select.POLLIN)
        if asker is not None:
            self._poll.register(asker, 0)  # its end is always told
        self.unasked = False

    def next(self, seconds: float) -> bytes:
        """The next line; empty if the pipe ended or the time is over."""
        deadline = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            part = os.read(self._number, 1 << 16) if self._wait(deadline) else b""
            if not part:
                return b""
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line + b"\n"

    def fill(self, view: memoryview, seconds: float) -> bool:
        """Read bytes until the view is full; False: the pipe ended, or the time."""
        deadline = time.monotonic() + seconds
        done = min(len(view), len(self._buffer))
        view[:done], self._buffer = self._buffer[:done], self._buffer[done:]
        while done < len(view):
            ready = self._wait(deadline)
            read = os.readv(self._number, [view[done:]]) if ready else 0
            if not read:
                return False
            done += read
        return True

    def _wait(self, deadline: float) -> bool:
        """Whether the pipe has more, or has ended; False: the time is over, or nobody
        asks any more."""
        left = max(0.0, deadline - time.monotonic())
        ready = [number for number, _ in self._poll.poll(left * 1000)]
        self.unasked = bool(ready) and self._number not in ready
        return self._number in ready

    def close(self) -> None:
        """Close the pipe."""
        os.close(self._number)


class ModuleInspector:
    """Reads files in a process of its own. Thread-safe; one job at a time."""

    def __init__(self, limits: InspectionLimits | None = None):
        self.limits = limits or InspectionLimits()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._to: IO[bytes] | None = None
        self._from: PipeLines | None = None

    def warm_up(self) -> None:
        """Start the helper process, so that the first job does not wait for it."""
        with self._lock, contextlib.suppress(EOFError):
            self._start()

    def inspect(self, name: str, path: str, **options: Any) -> ModuleInfo:
        """As `inspect_module`; fetching from the Hub happens in this process.

        Raises:
            ValueError: one line: the module is refused, or inspecting it took more
                than the limits allow.
        """
        job = self._job(name, locate(name, path))
        job |= {"options": asdict(ModuleOptions(**options))}
        with self._lock:
            reply = self._ask(job)
        if "error" in reply:
            raise ValueError(reply["error"])
        return ModuleInfo.from_json(reply["module"])

    def load(
        self,
        module: ModuleInfo,
        site: SiteInfo,
        into: Sequence[torch.Tensor],
        seconds: float,
        shard: Shard = WHOLE,
    ) -> float:
        """As `load_site` and `load_vectors`, into tensors on the host.

        Args:
            into: `SAEWeights.tensors()` of buffers that fit the site exactly, or a
                vector's float32 `[D]`.
            seconds: how long it may take.
            shard: what of the SAE `into` has room for.

        Returns:
            how long it took, in seconds, without the wait for other jobs.

        Raises:
            ValueError: as `load_site`, or loading took more than the limits allow;
                `into` may then hold a part of the site.
        """
        job = self._job(module.name, locate(module.name, module.path))
        job |= {
            "module": module.to_json(),
            "site": module.sites.index(site),
            "dtype": str(into[0].dtype).removeprefix("torch."),
            "size": sum(tensor.nbytes for tensor in into),
            "seconds": seconds,
            "shard": [shard.rank, shard.size],
        }
        with self._lock:
            start = time.monotonic()
            reply = self._ask(job, into)
            took = time.monotonic() - start
        if "error" in reply:
            raise ValueError(reply["error"])
        return took

    def close(self) -> None:
        """End the helper process."""
        with self._lock:
            self._stop()

    def _job(self, name: str, found: LocatedModule) -> Json:
        return {
            "name": name,
            "path": found.path,
            "pinned": found.pinned,
            "root": str(found.location.root),
            "origin": found.location.origin,
            "overrides": asdict(found.location.overrides),
            "limits": asdict(self.limits),
        }

    def _ask(self, job: JsonView, into: Sequence[torch.Tensor] = ()) -> Json:
        prefix = f"steering module {job['name']!r} ({job['path']})"
        # Try twice, because something may have ended the helper.
        for _ in range(2):
            with contextlib.suppress(BrokenPipeError, EOFError):
                self._start()
                assert self._to is not None
                self._to.write(json.dumps(job).encode() + b"\n")
                self._to.flush()
                reply = self._loaded(job, into) if into else self._inspected()
                if reply is not None:
                    return reply
                self._stop()
                return {"error": f"{prefix}: {TOO_LONG}"}
            self._stop()
        return {"error": f"{prefix}: the inspecting process ends at once"}

    def _inspected(self) -> Json:
        longest = self.limits.seconds_for(self.limits.module_bytes)
        line = self._line(self.limits.seconds + GRACE_SECONDS)
        if line.startswith(b'{"hashing"'):
            seconds = min(json.loads(line)["seconds"], longest)
            line = self._line(seconds + GRACE_SECONDS)
        if not line:
            raise EOFError
        return json.loads(line)

    def _loaded(self, job: JsonView, into: Sequence[torch.Tensor]) -> Json | None:
        """The reply to a job that loads; None: the tensors came only in part."""
        seconds = job["seconds"] + GRACE_SECONDS
        deadline = time.monotonic() + seconds
        line = self._line(seconds)
        if not line:
            raise EOFError
        reply: Json = json.loads(line)
        if "error" in reply:
            return reply
        assert self._from is not None
        for tensor in into:
            left = deadline - time.monotonic()
            if not self._from.fill(bytes_of(tensor), left):
                return None
        return reply

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
        with contextlib.suppress(OSError):  # more than this user may have
            fcntl.fcntl(reply_end, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
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


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the host."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


@functools.cache
def module_inspector() -> ModuleInspector:
    """This process's inspector; it starts its helper when that is first needed."""
    return ModuleInspector()
