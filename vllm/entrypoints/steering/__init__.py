# SPDX-License-Identifier: Apache-2.0
"""Steering modules for operators: the command line, and changes to a running engine.

`python -m vllm.entrypoints.steering` inspects, converts and probes; the functions here
register, replace, list and unregister modules of an `LLM`.
"""

from vllm.entrypoints.steering.offline import (
    SteeringModuleError,
    list_modules,
    register_module,
    replace_module,
    unregister_module,
)

__all__ = [
    "SteeringModuleError",
    "list_modules",
    "register_module",
    "replace_module",
    "unregister_module",
]
