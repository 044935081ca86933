# SPDX-License-Identifier: Apache-2.0
"""Steering modules for operators: the command line, and changes to a running engine.

`python -m vllm.entrypoints.steering` inspects, converts and probes; the functions here
register, replace, list and unregister modules of an `LLM`.
"""

from vllm.entrypoints.steering.offline import (
    SteeringModuleError,
    delete_preset,
    list_modules,
    put_preset,
    register_module,
    register_vector,
    replace_module,
    set_default_preset,
    unregister_module,
)

__all__ = [
    "SteeringModuleError",
    "delete_preset",
    "list_modules",
    "put_preset",
    "register_module",
    "register_vector",
    "replace_module",
    "set_default_preset",
    "unregister_module",
]
