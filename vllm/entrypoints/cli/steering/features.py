# SPDX-License-Identifier: Apache-2.0
"""`vllm-steering features`: the features that tell some texts from others."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vllm.config.sae_labels import Labels, labels_of, load_labels
from vllm.config.steering import ModuleInfo
from vllm.config.steering_points import parse_site
from vllm.entrypoints.cli.steering.inputs import (
    check_model_path,
    need_sae,
    quiet_engine,
    texts_of,
)
from vllm.entrypoints.cli.steering.probe import windows
from vllm.entrypoints.cli.steering.probe_engine import MODULE, probing_engine
from vllm.entrypoints.steering.evaluate import (
    SiteEvaluation,
    TooShortError,
    evaluate,
)
from vllm.entrypoints.steering.finder import (
    check_one_site,
    check_top,
    find_features,
)
from vllm.entrypoints.steering.found import FoundFeatures
from vllm.model_executor.model_loader.sae_loader import inspect_module

if TYPE_CHECKING:
    from vllm import LLM


def features(
    path: str,
    model: str,
    text_file: str,
    against_file: str | None,
    *,
    top: int = 20,
    site: str | None = None,
    dtype: str = "auto",
    labels_file: str | None = None,
    as_json: bool = False,
    plot: str | None = None,
) -> int:
    """Print what tells the texts of one file from those of another; exit status 0.

    Whatever can be refused without the model is refused before it is loaded.

    Raises:
        ValueError, OSError: an argument, a file, the module or the model is refused.
    """
    quiet_engine()
    check_top("--top", top)
    texts = texts_of("--text", text_file)
    against = None if against_file is None else texts_of("--against", against_file)
    labels = labels_at(path, labels_file)
    if plot is not None:
        _check_plot(plot)
    check_model_path(model)
    sae_of(path, site)
    sites = None if site is None else [site]
    with probing_engine(path, model, {"dtype": dtype, "sites": sites}) as llm:
        own, other = windows_of(llm, texts), windows_of(llm, against or [])
        found = find_features(llm, MODULE, own, other, top=top, labels=labels)
        fit = _fit(llm, own)
    if fit is not None and fit.fit_warning is not None:
        found.warnings.append(fit.fit_warning)
    if as_json:
        fitted = None if fit is None else {"fvu": fit.fvu, "l0": fit.l0}
        shown = {**found.to_json(), "module": path, "model": model, "fit": fitted}
        print(json.dumps(shown, indent=1))
    else:
        for warning in found.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        print(found)
    if plot is not None:
        _plot(found, plot)
    return 0


def sae_of(path: str, site: str | None) -> ModuleInfo:
    """An SAE of one site, or at one of its sites.

    Raises:
        ValueError: bad site, vectors, or several sites and none chosen.
    """
    if site is not None and parse_site(site) is None:
        raise ValueError(
            f"--site: found {site!r}, expected HOOK.LAYER such as post_block.20"
        )
    info = inspect_module(MODULE, path, sites=None if site is None else [site])
    need_sae(path, info)
    check_one_site("--site", [one.name for one in info.sites])
    return info


def windows_of(llm: LLM, texts: list[str]) -> list[list[int]]:
    """Token ids of the texts, long ones in several parts."""
    tokenizer = llm.get_tokenizer()
    found = []
    for text in texts:
        ids = list(tokenizer(text, verbose=False).input_ids)
        found += windows(ids, tokenizer.bos_token_id, len(ids))
    return found


def _fit(llm: LLM, texts: list[list[int]]) -> SiteEvaluation | None:
    """How well the SAE fits the texts; None if they are too short to tell."""
    try:
        return evaluate(llm, MODULE, texts)[0]
    except TooShortError:
        return None


def labels_at(path: str, file: str | None) -> Labels:
    """The labels of a file, or those beside the module."""
    if file is None:
        return labels_of(path)
    try:
        return load_labels(file)
    except OSError as error:
        raise ValueError(f"--labels {file}: {error.strerror}") from None


def _check_plot(file: str) -> None:
    """Raise `ValueError` unless a figure can be written there."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError(
            "--plot: needs matplotlib, which is not installed: pip install matplotlib"
        ) from None
    known = Figure().canvas.get_supported_filetypes()
    place = Path(file)
    if place.suffix[1:].lower() not in known:
        endings = ", ".join(f".{name}" for name in sorted(known))
        raise ValueError(
            f"--plot {file}: expected a name that ends in one of {endings}"
        )
    if not place.parent.is_dir() or place.is_dir():
        raise ValueError(f"--plot {file}: expected a file in a directory that exists")


def _plot(found: FoundFeatures, file: str) -> None:
    """A bar for each feature's mean difference, its AUROC in the label."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.3 * len(found) + 1.2), layout="constrained")
    axes = figure.subplots()
    names = [
        f"{one.feature_idx} {one.label[:40]}".strip()
        + ("" if one.auroc is None else f" ({one.auroc:.2f})")
        for one in found
    ]
    axes.barh(names[::-1], [one.mean_difference for one in found][::-1])
    axes.set_xlabel(f"mean activation on A less that on B, at {found.site} (AUROC)")
    figure.savefig(file)
