# SPDX-License-Identifier: Apache-2.0
"""Seam into `vllm.platforms.interface`: our environment variables are known ones.

The edit a branch would make: `vllm.envs` lists them, and its compile factors ignore
them. Here they are listed only while `validate_environ` runs, because listed variables
go into the compile-cache key, and one of these is a secret.
"""

from __future__ import annotations

import os
from functools import partial

from vllm.config.steering_environment import (
    BRANCHES_ENV,
    DIRECTORY_ENV,
    IDLE_GRAPHS_ENV,
    KEY_ENV,
    NO_CUDA_ENV,
    OTHER_GPUS_ENV,
    PEER_MEMORY_ENV,
)
from vllm.plugins.steering.seam import Stock, wrap

MODULE = "vllm.platforms.interface"
KNOWN = (
    KEY_ENV,
    DIRECTORY_ENV,
    BRANCHES_ENV,
    IDLE_GRAPHS_ENV,
    NO_CUDA_ENV,
    OTHER_GPUS_ENV,
    PEER_MEMORY_ENV,
)


def install() -> None:
    """Have `--fail-on-environ-validation` accept our variables."""
    target = f"{MODULE}:Platform.validate_environ"
    wrap(target, ("hard_fail",), _make, classmethod)


def _make(stock: Stock) -> Stock:
    def validate_environ(cls: type, hard_fail: bool) -> None:
        from vllm.envs import environment_variables

        ours = {name: partial(os.environ.get, name) for name in KNOWN}
        environment_variables.update(ours)
        try:
            stock(cls, hard_fail)
        finally:
            for name in ours:
                del environment_variables[name]

    return validate_environ
