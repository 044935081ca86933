# SPDX-License-Identifier: Apache-2.0
"""Steering for operators and researchers, on an `LLM` in this process.

The functions register, replace, list and unregister modules, read features of texts,
find the features that tell texts apart, survey what features do on a corpus, and
evaluate a module. `python -m vllm.entrypoints.steering` is the command line.
"""

from vllm.entrypoints.steering.encoded import EncodedText, EncodedTexts
from vllm.entrypoints.steering.evaluate import Evaluation, SiteEvaluation, evaluate
from vllm.entrypoints.steering.finder import find_features
from vllm.entrypoints.steering.found import FoundFeature, FoundFeatures
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
from vllm.entrypoints.steering.reading import encode
from vllm.entrypoints.steering.survey import survey
from vllm.entrypoints.steering.surveyed import Survey, SurveyedFeature

__all__ = [
    "EncodedText",
    "EncodedTexts",
    "Evaluation",
    "FoundFeature",
    "FoundFeatures",
    "SiteEvaluation",
    "SteeringModuleError",
    "Survey",
    "SurveyedFeature",
    "delete_preset",
    "encode",
    "evaluate",
    "find_features",
    "list_modules",
    "put_preset",
    "register_module",
    "register_vector",
    "replace_module",
    "set_default_preset",
    "survey",
    "unregister_module",
]
