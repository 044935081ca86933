# SPDX-License-Identifier: Apache-2.0
"""The helper process of `ModuleInspector`: one forked child for each module.

Reads jobs, one JSON object a line, from the pipe whose number is the first argument,
and writes one reply a line into the second. Ends when the first pipe closes.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import IO

import torch

from vllm.config.steering_json import Json
from vllm.model_executor.model_loader.sae_formats.layout import Location, Overrides
from vllm.model_executor.model_loader.sae_inspector import (
    InspectionLimits,
    PipeLines,
)
from vllm.model_executor.model_loader.sae_loader import (
    LocatedModule,
    ModuleOptions,
    inspect_files,
)

Job = Json


def main(jobs: IO[bytes], replies: IO[bytes]) -> None:
    """Serve jobs until the engine closes the pipe."""
    # A forked child can only use the thread that forks.
    torch.set_num_threads(1)
    replies.write(b"ready\n")
    replies.flush()
    for line in jobs:
        supervise(json.loads(line), replies)


def supervise(job: Job, replies: IO[bytes]) -> None:
    """Run a job in a child. If the child runs out of time or dies, reply for it."""
    limits = InspectionLimits(**job["limits"])
    read_end, write_end = os.pipe()
    if (child := os.fork()) == 0:
        os.close(read_end)
        run_child(job, limits, write_end)
    os.close(write_end)
    with contextlib.closing(PipeLines(read_end)) as answers:
        line = answers.next(limits.seconds)
        if line.startswith(b'{"hashing"'):
            replies.write(line)
            replies.flush()
            line = answers.next(json.loads(line)["seconds"])
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not line:
        reason = f"took more than the {limits.seconds:g} s allowed"
        if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
            reason = f"ended with status {status}, perhaps out of memory"
        prefix = f"steering module {job['name']!r} ({job['path']})"
        line = as_line({"error": f"{prefix}: inspecting it {reason}"})
    replies.write(line)
    replies.flush()


def as_line(reply: Json) -> bytes:
    """One reply as one line of JSON."""
    return json.dumps(reply).encode() + b"\n"


def run_child(job: Job, limits: InspectionLimits, write_end: int) -> None:
    """Inspect under the limits, write the answer, and leave the process."""
    status = 1
    try:
        limit_resources(limits)
        os.write(write_end, as_line(inspect_job(job, limits, write_end)))
        status = 0
    finally:
        # Not sys.exit: the parent's handlers and buffers are not this process's.
        os._exit(status)


def limit_resources(limits: InspectionLimits) -> None:
    """Bound what this process allocates; it writes no files and no core dump."""
    with open("/proc/self/statm") as stream:
        data_pages = int(stream.read().split()[5])
    memory = data_pages * resource.getpagesize() + limits.memory_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def inspect_job(job: Job, limits: InspectionLimits, write_end: int) -> Json:
    """The module as JSON, or the one line that says why it is refused."""
    prefix = f"steering module {job['name']!r} ({job['path']})"

    def before_hashing(size: int) -> None:
        if size > limits.module_bytes:
            raise ValueError(
                f"{prefix}: expected at most {limits.module_bytes} bytes of weights, "
                f"found {size}"
            )
        seconds = limits.hashing_seconds(size)
        os.write(write_end, as_line({"hashing": size, "seconds": seconds}))

    overrides = Overrides(**job["overrides"])
    location = Location(
        Path(job["root"]), job["origin"], listed=False, overrides=overrides
    )
    found = LocatedModule(job["path"], job["pinned"], location)
    try:
        module = inspect_files(
            job["name"], found, ModuleOptions(**job["options"]), before_hashing
        )
    except ValueError as error:
        return {"error": str(error)}
    except MemoryError:
        return {
            "error": f"{prefix}: inspecting it needs more than the "
            f"{limits.memory_bytes >> 20} MiB of memory allowed"
        }
    return {"module": module.to_json()}


if __name__ == "__main__":
    with open(int(sys.argv[1]), "rb") as jobs, open(int(sys.argv[2]), "wb") as replies:
        main(jobs, replies)
