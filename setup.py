# SPDX-License-Identifier: Apache-2.0
"""Build the overlay wheel: our files under `vllm/`, beside the stock wheel's.

Where nvcc, CMake and torch are found, `csrc/steering` is built too (CMakeLists.txt) and
the wheel is a platform wheel; anywhere else it is pure Python and Triton is used. pip's
isolated builds have no torch: build with `--no-build-isolation` to get the extension.
Set `VLLM_STEERING_NO_CUDA=1` to skip it.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent


def builds_cuda() -> bool:
    """Whether this machine can build the CUDA extension, and may."""
    if os.environ.get("VLLM_STEERING_NO_CUDA") == "1":
        return False
    tools = all(shutil.which(tool) for tool in ("nvcc", "cmake"))
    has_torch = importlib.util.find_spec("torch") is not None
    return tools and has_torch and (ROOT / "csrc" / "steering").is_dir()


class CMakeBuild(build_ext):
    """Run CMake and let it place the shared library in the package."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        target.mkdir(parents=True, exist_ok=True)
        work = Path(self.build_temp) / ext.name
        work.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            str(ROOT),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
        ]
        subprocess.check_call(configure, cwd=work)
        subprocess.check_call(["cmake", "--build", ".", "-j"], cwd=work)


setup(
    packages=find_namespace_packages(include=["vllm", "vllm.*", "vllm_steering_cli"]),
    package_data={
        "vllm.entrypoints.serve.steering.static": ["*"],
        "vllm.model_executor.model_loader.sae_formats": ["*.json"],
    },
    ext_modules=[Extension("vllm._steering_C", [])] if builds_cuda() else [],
    cmdclass={"build_ext": CMakeBuild},
)
