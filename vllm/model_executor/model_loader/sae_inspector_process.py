# SPDX-License-Identifier: Apache-2.0
"""The helper process of `ModuleInspector`: one forked child for each module.

Reads jobs, one JSON object a line, from the pipe whose number is the first argument,
and writes one reply a line into the second; the bytes of tensors follow the reply to a
job that loads. Ends when the first pipe closes, in the middle of a job too: a large
file on a slow disk may take hours. A child ends with this process.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import IO

import torch

from vllm.config.steering import ModuleInfo
from vllm.config.steering_json import Json
from vllm.model_executor.layers.steering_shards import Shard
from vllm.model_executor.layers.steering_state import SAEWeights
from vllm.model_executor.model_loader.sae_formats.layout import Location, Overrides
from vllm.model_executor.model_loader.sae_inspector import (
    InspectionLimits,
    PipeLines,
    bytes_of,
)
from vllm.model_executor.model_loader.sae_loader import (
    ModuleOptions,
    inspect_files,
    load_site,
    load_vectors,
)
from vllm.model_executor.model_loader.sae_location import LocatedModule

Job = Json
LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
# What a child says before it writes tensors to the engine.
SENDING = b"sending\n"
# Of a model's activations, and of vectors.
DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def main(jobs: IO[bytes], replies: IO[bytes]) -> None:
    """Serve jobs until the engine closes the pipe."""
    # A forked child can only use the thread that forks.
    torch.set_num_threads(1)
    replies.write(b"ready\n")
    replies.flush()
    for line in jobs:
        supervise(json.loads(line), jobs.fileno(), replies)


def supervise(job: Job, asker: int, replies: IO[bytes]) -> None:
    """Run a job in a child. If the child runs out of time or dies, reply for it.

    Args:
        job: what to do.
        asker: number of the pipe that the job came from.
        replies: where the reply goes.
    """
    limits = InspectionLimits(**job["limits"])
    read_end, write_end = os.pipe()
    own_id = os.getpid()
    if (child := os.fork()) == 0:
        os.close(read_end)
        end_with(own_id)
        run_child(job, limits, write_end, replies)
    os.close(write_end)
    seconds = job.get("seconds", limits.seconds)
    sends = False
    with contextlib.closing(PipeLines(read_end, asker)) as answers:
        line = answers.next(seconds)
        if line.startswith(b'{"hashing"'):
            replies.write(line)
            replies.flush()
            seconds = json.loads(line)["seconds"]
            line = answers.next(seconds)
        elif line == SENDING:
            # Until the child ends it writes to the engine itself.
            sends = True
            answers.next(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if answers.unasked:
        sys.exit()
    if sends:
        if status:
            sys.exit("a module's tensors were sent in part")
        return
    if not line:
        what = "loading" if "module" in job else "inspecting"
        error = f"{prefix_of(job)}: {what} it {why_silent(status, seconds)}"
        line = as_line({"error": error})
    replies.write(line)
    replies.flush()


def why_silent(status: int, seconds: float) -> str:
    """Why a child has not answered.

    Args:
        status: how it ended, as `os.waitpid` says.
        seconds: after which it was killed.
    """
    signalled = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if signalled == signal.SIGKILL:
        return f"took more than the {seconds:.3g} s allowed"
    if signalled == signal.SIGBUS:
        return "failed: a file became shorter, or its disk failed, while it was read"
    return f"ended with status {status}, perhaps out of memory"


def end_with(parent: int) -> None:
    """Have this process killed when its parent ends."""
    LIBC.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # it has ended before
        os._exit(1)


def prefix_of(job: Job) -> str:
    """How an error about the job's module begins."""
    return f"steering module {job['name']!r} ({job['path']})"


def as_line(reply: Json) -> bytes:
    """One reply as one line of JSON."""
    return json.dumps(reply).encode() + b"\n"


def run_child(
    job: Job, limits: InspectionLimits, write_end: int, replies: IO[bytes]
) -> None:
    """Do a job under the limits, write the answer, and leave the process."""
    status = 1
    try:
        # It may write no files, and a log is one.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        loads = "module" in job
        # Reading one tensor whole, in another dtype, may take three times its memory.
        # `size` is that of a shard, but a file may have to be read whole.
        whole = job.get("size", 0) * job.get("shard", [0, 1])[1]
        allowed = limits.memory_bytes + 3 * whole
        limit_resources(allowed)
        try:
            if loads:
                load_job(job, write_end, replies)
            else:
                os.write(write_end, as_line(inspect_job(job, limits, write_end)))
        except ValueError as error:
            os.write(write_end, as_line({"error": str(error)}))
        except (MemoryError, RuntimeError) as error:
            # PyTorch raises a RuntimeError when it cannot allocate.
            if not isinstance(error, MemoryError) and "allocate" not in str(error):
                raise
            what = "loading" if loads else "inspecting"
            text = (
                f"{prefix_of(job)}: {what} it needs more than the {allowed >> 20} MiB "
                "of memory allowed"
            )
            os.write(write_end, as_line({"error": text}))
        status = 0
    finally:
        # Not sys.exit: the parent's handlers and buffers are not this process's.
        os._exit(status)


def limit_resources(allowed: int) -> None:
    """Bound what this process allocates; it writes no files and no core dump."""
    with open("/proc/self/statm") as stream:
        data_pages = int(stream.read().split()[5])
    memory = data_pages * resource.getpagesize() + allowed
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def location_of(job: Job) -> Location:
    """Where the job's files are; errors list no directory."""
    overrides = Overrides(**job["overrides"])
    return Location(Path(job["root"]), job["origin"], listed=False, overrides=overrides)


def inspect_job(job: Job, limits: InspectionLimits, write_end: int) -> Json:
    """The module as JSON.

    Raises:
        ValueError: one line that says why the module is refused.
    """

    def before_hashing(size: int) -> None:
        if size > limits.module_bytes:
            raise ValueError(
                f"{prefix_of(job)}: expected at most {limits.module_bytes} bytes of "
                f"weights, found {size}"
            )
        seconds = limits.seconds_for(size)
        os.write(write_end, as_line({"hashing": size, "seconds": seconds}))

    found = LocatedModule(job["path"], job["pinned"], location_of(job))
    options = ModuleOptions(**job["options"])
    module = inspect_files(job["name"], found, options, before_hashing)
    return {"module": module.to_json()}


def load_job(job: Job, write_end: int, replies: IO[bytes]) -> None:
    """Load one site and send its tensors.

    Raises:
        ValueError: as `load_site`.
    """
    module = ModuleInfo.from_json(job["module"])
    site = module.sites[job["site"]]
    if module.kind == "sae":
        dtype = DTYPES[job["dtype"]]
        shard = Shard(*job["shard"])
        weights = SAEWeights.for_site(site, dtype, torch.device("cpu"), shard)
        load_site(module, site, weights, location_of(job))
        tensors = weights.tensors()
    else:
        tensors = [load_vectors(module, site, location_of(job))]
    size = sum(tensor.nbytes for tensor in tensors)
    if size != job["size"]:
        raise ValueError(
            f"{prefix_of(job)}: expected {job['size']} bytes of tensors, found {size}"
        )
    os.write(write_end, SENDING)
    replies.write(as_line({"size": size}))
    for tensor in tensors:
        replies.write(bytes_of(tensor))
    replies.flush()


if __name__ == "__main__":
    with open(int(sys.argv[1]), "rb") as jobs, open(int(sys.argv[2]), "wb") as replies:
        main(jobs, replies)
