# SPDX-License-Identifier: Apache-2.0
"""The steering configuration of a running engine, in every process that needs it.

Modules come and go, and the engine core decides. It publishes the configuration in a
small file (the registry) that every API server process of the engine stats when a
request asks for steering. No file means that nothing has changed since start-up.
"""

from __future__ import annotations

import json
import os
import tempfile
import uuid
from contextlib import suppress
from multiprocessing.util import Finalize
from typing import Any

from vllm.config.steering import SteeringConfig, get_steering_config

# The resolved JSON that was read last, and what it stands for. Holding the JSON
# keeps its identity from being reused.
_LAST: tuple[Any, SteeringConfig | None] = (None, None)

# An attribute of `VllmConfig`, which reaches the engine core with it. It may not be in
# `additional_config`, which vLLM hashes into its compile-cache key.
REGISTRY_ATTRIBUTE = "steering_registry"
# Where the process that starts several API servers leaves the path for them.
REGISTRY_ENV = "VLLM_STEERING_REGISTRY"

# Registry path -> what identifies the version that was read last.
_READ: dict[str, tuple[int, int]] = {}


def active_steering_config(
    vllm_config: Any, *, in_core: bool = False
) -> SteeringConfig | None:
    """`get_steering_config` of a `VllmConfig`, without rebuilding it per request.

    Replacing `additional_config["steering"]["resolved"]` replaces the result. The
    engine core (`in_core`), which publishes, does not look for what others did.
    """
    global _LAST
    additional_config = vllm_config.additional_config
    if not isinstance(additional_config, dict):
        return None
    steering = additional_config.get("steering")
    if steering is None:
        return None
    if not in_core:
        _follow_registry(vllm_config, steering)
    resolved, config = _LAST
    if resolved is not steering["resolved"]:
        resolved = steering["resolved"]
        config = get_steering_config(additional_config)
        _LAST = (resolved, config)
    return config


def assign_registry(vllm_config: Any) -> None:
    """Choose where the engine of this configuration will publish its modules."""
    parallel = vllm_config.parallel_config
    one_of_several = parallel._api_process_count > 1
    path = os.environ.get(REGISTRY_ENV)
    if not (one_of_several and parallel._api_process_rank >= 0 and path):
        name = f"vllm-steering-{uuid.uuid4().hex}.json"
        path = os.path.join(tempfile.gettempdir(), name)
        if one_of_several:
            os.environ[REGISTRY_ENV] = path
        # Not left to the engine core, which may be killed when a server stops.
        Finalize(None, _remove, (path,), exitpriority=1)
    object.__setattr__(vllm_config, REGISTRY_ATTRIBUTE, path)


def publish(vllm_config: Any, config: SteeringConfig, *, to_others: bool) -> None:
    """Make `config` the engine's configuration, here and in its front ends.

    Args:
        vllm_config: of the engine core.
        config: what requests are admitted under from now on.
        to_others: whether front ends run in other processes.
    """
    resolved = config.to_json()
    path = getattr(vllm_config, REGISTRY_ATTRIBUTE, None)
    if path is not None and to_others:
        fresh = f"{path}.{os.getpid()}"
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "w") as file:
            json.dump(resolved, file)
        os.replace(fresh, path)
    vllm_config.additional_config["steering"]["resolved"] = resolved


def _remove(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)


def _follow_registry(vllm_config: Any, steering: dict[str, Any]) -> None:
    """Take over what the engine core has published since the last look."""
    path = getattr(vllm_config, REGISTRY_ATTRIBUTE, None)
    if path is None:
        return
    try:
        found = os.stat(path)
        version = (found.st_ino, found.st_mtime_ns)
        if _READ.get(path) == version:
            return
        with open(path) as file:
            resolved = json.load(file)
    except FileNotFoundError:
        return
    _READ[path] = version
    steering["resolved"] = resolved
