# SPDX-License-Identifier: Apache-2.0
"""Steering for operators and researchers, on an `LLM` in this process.

The functions register, replace, list and unregister modules, read features of texts,
find the features that tell texts apart, and evaluate a module. `python -m
vllm.entrypoints.steering` is the command line.
"""

from vllm.entrypoints.steering.encoded import EncodedText, EncodedTexts, encode
from vllm.entrypoints.steering.evaluate import Evaluation, SiteEvaluation, evaluate
from vllm.entrypoints.steering.finder import (
    FoundFeature,
    FoundFeatures,
    find_features,
)
from vllm.entrypoints.steering.offline import (
    SteeringModuleError,
    list_modules,
    register_module,
    replace_module,
    unregister_module,
)

__all__ = [
    "EncodedText",
    "EncodedTexts",
    "Evaluation",
    "FoundFeature",
    "FoundFeatures",
    "SiteEvaluation",
    "SteeringModuleError",
    "encode",
    "evaluate",
    "find_features",
    "list_modules",
    "register_module",
    "replace_module",
    "unregister_module",
]
