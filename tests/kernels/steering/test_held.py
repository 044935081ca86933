# SPDX-License-Identifier: Apache-2.0
"""What the extension holds is checked as if it were passed to each op.

No GPU: `launch_recorder.cpp` stands in for the CUDA runtime. It needs the compiled
extension (`make csrc`), a C++ compiler, and a PyTorch that does not load the runtime
itself.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vllm.model_executor.layers.steering_kernels.extension import extension_library

HERE = Path(__file__).parent
COMPILER = shutil.which("c++")


def compiled_extension() -> Path | None:
    """The extension that `make csrc` has made, else the installed one."""
    made = sorted((HERE.parents[2] / "build" / "csrc" / "lib").glob("_steering_C*.so"))
    return made[0] if made else extension_library()


def make_recorder(extension: Path, folder: Path) -> Path:
    """The recorder, under the name and the version that the extension asks for."""
    name = re.search(rb"libcudart\.so\.\d+", extension.read_bytes())
    assert name is not None
    runtime = name[0].decode()
    versions = folder / "versions"
    versions.write_text(f"{runtime} {{ cuda*; __cuda*; }};")
    target = folder / runtime
    subprocess.run(
        [
            COMPILER, "-shared", "-fPIC", "-O1", str(HERE / "launch_recorder.cpp"),
            "-o", str(target), f"-Wl,-soname,{runtime}",
            f"-Wl,--version-script={versions}", "-ldl",
        ],
        check=True,
    )  # fmt: skip
    return target


@pytest.mark.skipif(
    compiled_extension() is None or COMPILER is None,
    reason="needs the compiled extension and a C++ compiler",
)
@pytest.mark.skipif(
    torch.version.cuda is not None,
    reason="PyTorch's CUDA build needs all of the CUDA runtime",
)
def test_held_tensors_are_checked_as_if_they_were_passed(tmp_path: Path) -> None:
    extension = compiled_extension()
    assert extension is not None
    recorder = make_recorder(extension, tmp_path)
    done = subprocess.run(
        [sys.executable, str(HERE / "held_cases.py"), str(extension)],
        env=os.environ | {"LD_PRELOAD": str(recorder), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cases passed" in done.stdout
