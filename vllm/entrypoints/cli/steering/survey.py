# SPDX-License-Identifier: Apache-2.0
"""`vllm-steering survey`: what each feature of an SAE does on a corpus."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from vllm.config.steering_checks import integer_in_range
from vllm.entrypoints.cli.steering.features import labels_at, sae_of, windows_of
from vllm.entrypoints.cli.steering.inputs import (
    check_model_path,
    quiet_engine,
    texts_of,
)
from vllm.entrypoints.cli.steering.probe_engine import MODULE, probing_engine
from vllm.entrypoints.steering.survey import survey as survey_texts
from vllm.entrypoints.steering.surveyed import Survey
from vllm.model_executor.model_loader.sae_loader import inspect_module


def survey(
    path: str,
    model: str,
    text_file: str,
    *,
    shown: Sequence[int] = (),
    out: str | None = None,
    site: str | None = None,
    dtype: str = "auto",
    labels_file: str | None = None,
    as_json: bool = False,
) -> int:
    """Print statistics of the features on the texts of a file; exit status 0.

    Whatever can be refused without the model is refused before it is loaded.

    Raises:
        ValueError, OSError: an argument, a file, the module or the model is refused.
    """
    quiet_engine()
    texts = texts_of("--text", text_file)
    labels = labels_at(path, labels_file)
    if out is not None and not (Path(out).is_dir() or Path(out).parent.is_dir()):
        raise ValueError(f"--out {out}: expected a file in a directory that exists")
    check_model_path(model)
    info = sae_of(path, site)
    for feature in shown:
        integer_in_range("--feature", feature, 0, info.sites[0].d_sae - 1)
    sites = None if site is None else [site]
    with probing_engine(path, model, {"dtype": dtype, "sites": sites}) as llm:
        found = survey_texts(llm, MODULE, windows_of(llm, texts), labels=labels)
    found.of_several = site is not None and _has_several_sites(path)
    if as_json:
        told = {**found.to_evidence(), "tokens": found.tokens, "module": path}
        print(json.dumps({**told, "model": model, "warnings": found.warnings}))
    else:
        _print(found, shown)
    if out is not None:
        found.save(out)
    return 0


def _has_several_sites(path: str) -> bool:
    """Whether the files are of several sites; not if they do not name their site."""
    try:
        return len(inspect_module(MODULE, path).sites) > 1
    except ValueError:
        return False


def _print(found: Survey, shown: Sequence[int]) -> None:
    for warning in found.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(found)
    for feature in shown:
        print(found[feature])
