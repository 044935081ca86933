# SPDX-License-Identifier: Apache-2.0
"""`vllm-steering features`: the features that tell some texts from others."""

from __future__ import annotations

import importlib.util
import json
import sys
from typing import TYPE_CHECKING

from vllm.config.sae_labels import Labels, labels_of, load_labels
from vllm.config.steering import parse_site
from vllm.config.steering_json import Json
from vllm.entrypoints.cli.steering.inputs import (
    check_model_path,
    quiet_engine,
    texts_of,
)
from vllm.entrypoints.cli.steering.probe import MODULE, probing_engine, windows
from vllm.entrypoints.steering.evaluate import evaluate
from vllm.entrypoints.steering.finder import FoundFeatures, find_features

if TYPE_CHECKING:
    from vllm import LLM

# Above this share of unexplained variance the features mean little.
BAD_FVU = 0.6


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

    Raises:
        ValueError, OSError: a bad module, model, site or file, or `plot` without
            matplotlib.
    """
    quiet_engine()
    check_model_path(model)
    if plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot: needs matplotlib, which is not installed")
    texts = texts_of(text_file)
    against = None if against_file is None else texts_of(against_file)
    labels = labels_of(path) if labels_file is None else load_labels(labels_file)
    chosen = None
    if site is not None:
        parsed = parse_site(site)
        if parsed is None:
            raise ValueError(
                f"--site: found {site!r}, expected HOOK.LAYER such as post_block.20"
            )
        chosen = (parsed[1].value, parsed[0])
    options: Json = {"dtype": dtype}
    if site is not None:
        options["sites"] = [site]
    with probing_engine(path, model, options) as llm:
        own, other = _windows(llm, texts), _windows(llm, against or [])
        found = find_features(
            llm, MODULE, own, other, site=chosen, top=top, labels=labels
        )
        (fit,) = (one for one in evaluate(llm, MODULE, own) if one.site == found.site)
    if fit.fvu > BAD_FVU:
        found.warnings.append(
            f"FVU {fit.fvu:.2f}: the SAE explains little of this site on these texts; "
            "is it of this model, layer and hook?"
        )
    if as_json:
        fitted = {"fvu": fit.fvu, "l0": fit.l0}
        print(json.dumps({**found.to_json(), "module": path, "fit": fitted}, indent=1))
    else:
        _print(found, labels)
    if plot is not None:
        _plot(found, plot)
    return 0


def _windows(llm: LLM, texts: list[str]) -> list[list[int]]:
    """Token ids of the texts, long ones in several parts."""
    tokenizer = llm.get_tokenizer()
    found = []
    for text in texts:
        ids = list(tokenizer(text, verbose=False).input_ids)
        found += windows(ids, tokenizer.bos_token_id, len(ids))
    return found


def _print(found: FoundFeatures, labels: Labels) -> None:
    for warning in found.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"{found.site}: {len(found)} features, the best first")
    print(
        f"{'feature':>8} {'A - B':>9} {'AUROC':>6} {'on A':>6} {'on B':>6}  strongest"
    )
    for one in found:
        auroc = "" if one.auroc is None else f"{one.auroc:.3f}"
        print(
            f"{one.feature_idx:>8} {one.mean_difference:>9.3f} {auroc:>6} "
            f"{one.frequency:>6.1%} {one.frequency_against:>6.1%}  {one.label}"
        )
        for example in one.examples:
            text = f"{example.before}[{example.token}]{example.after}"
            print(f"{'':>40}{example.value:7.2f}  {' '.join(text.split())}")


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
