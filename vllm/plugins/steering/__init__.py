# SPDX-License-Identifier: Apache-2.0
"""SAE steering as a vLLM plugin: `register` is the `vllm.general_plugins` entry point.

Each file below is named after the stock module that a vLLM branch would edit, and
states the edit. vLLM loads general plugins in every process.
"""

from __future__ import annotations


def register() -> None:
    """Install the seams, each when its stock module is imported. Idempotent.

    On an unsupported vLLM release, only a guard is installed. It raises one error that
    names both versions if steering is configured.

    Raises:
        SeamError: a stock symbol of a supported vLLM is not as expected.
    """
    from vllm.plugins.steering.seam import vllm_is_supported

    if not vllm_is_supported():
        from vllm.plugins.steering.engine import arg_utils

        arg_utils.install_version_guard()
        return
    install_front_end_seams()
    install_worker_seams()


def install_front_end_seams() -> None:
    """Configuration, admission, prefix-cache keys and the HTTP request fields."""
    from vllm.plugins.steering.front_end import SEAMS
    from vllm.plugins.steering.lazy import when_imported

    for module, install in SEAMS:
        when_imported(module, install)


def install_worker_seams() -> None:
    """The seam that installs the runners' seams when a worker starts."""
    from vllm.plugins.steering.lazy import when_imported
    from vllm.plugins.steering.v1.worker import worker_base

    when_imported("vllm.v1.worker.worker_base", worker_base.install)
