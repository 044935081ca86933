# SPDX-License-Identifier: Apache-2.0
"""Whether two builds of the CUDA extension have the same machine code.

    python tools/compare_sass.py BEFORE AFTER [--diff LINES]

BEFORE and AFTER are files that nvcc made: `_steering_C*.so`, or an object file. A
kernel counts as the same if each instruction of it is, to the bit, and so are its
registers, stack, shared memory and parameters. A kernel that has only another name
is told as `renamed`. Exit status: 0 if all kernels of all targets are the same.

It needs `cuobjdump`: of the CUDA toolkit, or of Triton (`make triton`).
"""

from __future__ import annotations

import argparse
import difflib
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

Kernel = tuple[str, str]  # target, e.g. `sm_90a`, and mangled name
TRITON = Path(".venv/triton/triton/backends/nvidia/bin/cuobjdump")
TARGET = re.compile(r"^\s*(?:code for|arch =) (sm_\w+)$")
FUNCTION = re.compile(r"^\s*Function\s*:?\s*(\S+?):?$")
INSTRUCTION = re.compile(r"^\s*(?:/\*([0-9a-f]+)\*/\s+)?(.*?)\s*/\* (0x[0-9a-f]+) \*/$")


@dataclass(frozen=True)
class Code:
    """A kernel: instructions as `bits text`, and what it takes of the device."""

    lines: tuple[str, ...]
    resources: str = ""


@dataclass
class Comparison:
    """Kernels by what has become of them; `renamed` has the name before, and after."""

    same: list[Kernel] = field(default_factory=list)
    changed: list[Kernel] = field(default_factory=list)
    gone: list[Kernel] = field(default_factory=list)
    added: list[Kernel] = field(default_factory=list)
    renamed: list[tuple[Kernel, Kernel]] = field(default_factory=list)

    @property
    def is_same(self) -> bool:
        return not (self.changed or self.gone or self.added)


def parse_sass(text: str) -> dict[Kernel, tuple[str, ...]]:
    """The instructions of each kernel in the output of `cuobjdump -sass`."""
    found: dict[Kernel, list[str]] = {}
    target, lines = "", []
    for line in text.splitlines():
        if match := TARGET.match(line):
            target = match[1]
        elif match := FUNCTION.match(line):
            lines = found.setdefault((target, match[1]), [])
        elif match := INSTRUCTION.match(line):
            lines.append(f"{match[3]} {' '.join(match[2].split())}".rstrip())
    return {kernel: tuple(lines) for kernel, lines in found.items()}


def parse_resources(text: str) -> dict[Kernel, str]:
    """Registers, stack, shared memory and so on in the output of `-res-usage`."""
    found: dict[Kernel, str] = {}
    target, kernel = "", None
    for line in text.splitlines():
        if match := TARGET.match(line):
            target = match[1]
        elif match := FUNCTION.match(line):
            kernel = target, match[1]
        elif kernel is not None and "REG:" in line:
            found[kernel] = " ".join(line.split())
            kernel = None
    return found


def compare(before: dict[Kernel, Code], after: dict[Kernel, Code]) -> Comparison:
    """What has become of the kernels of `before`."""
    result = Comparison()
    for kernel in sorted(before.keys() & after.keys()):
        is_same = before[kernel] == after[kernel]
        (result.same if is_same else result.changed).append(kernel)
    added = sorted(after.keys() - before.keys())
    for kernel in sorted(before.keys() - after.keys()):
        twins = [k for k in added if k[0] == kernel[0] and after[k] == before[kernel]]
        if twins:
            added.remove(twins[0])
            result.renamed.append((kernel, twins[0]))
        else:
            result.gone.append(kernel)
    result.added = added
    return result


def find_cuobjdump() -> str:
    """The path of `cuobjdump`."""
    found = shutil.which("cuobjdump")
    if found is None and TRITON.exists():
        found = str(TRITON)
    if found is None:
        sys.exit(f"no cuobjdump on the PATH, and none at {TRITON}: `make triton`")
    return found


def read_kernels(path: Path) -> dict[Kernel, Code]:
    """All kernels of a file that nvcc made."""

    def dump(option: str) -> str:
        command = [find_cuobjdump(), option, str(path)]
        return subprocess.run(
            command, capture_output=True, text=True, check=True
        ).stdout

    resources = parse_resources(dump("-res-usage"))
    return {
        kernel: Code(lines, resources.get(kernel, ""))
        for kernel, lines in parse_sass(dump("-sass")).items()
    }


def describe(result: Comparison) -> list[str]:
    """A line for each kernel that is not the same, and a count."""
    other = {
        "changed": result.changed,
        "gone": result.gone,
        "added": result.added,
    }
    told = [
        f"{what}: {' '.join(kernel)}"
        for what, kernels in other.items()
        for kernel in kernels
    ]
    differ = len(told)
    told += [f"renamed: {' '.join(a)} -> {b[1]}" for a, b in result.renamed]
    same = len(result.same) + len(result.renamed)
    return [*told, f"{same} kernels are the same, {differ} are not"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--diff", type=int, default=0, help="lines of a diff to print")
    args = parser.parse_args()
    before, after = read_kernels(args.before), read_kernels(args.after)
    if not before:
        sys.exit(f"{args.before} has no kernels")
    result = compare(before, after)
    for kernel in result.changed if args.diff else ():
        a, b = before[kernel], after[kernel]
        found = difflib.unified_diff(
            [a.resources, *(line.split(" ", 1)[-1] for line in a.lines)],
            [b.resources, *(line.split(" ", 1)[-1] for line in b.lines)],
            *(f"{' '.join(kernel)} {when}" for when in ("before", "after")),
            lineterm="",
            n=1,
        )
        print("\n".join(list(found)[: args.diff]))
    print("\n".join(describe(result)))
    sys.exit(not result.is_same)


if __name__ == "__main__":
    main()
