# SPDX-License-Identifier: Apache-2.0
"""Lets `probe` measure an SAE at a site other than the one its files state."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from vllm.config.steering_points import site_name
from vllm.entrypoints.cli.steering.convert import LoadedSites, write
from vllm.model_executor.model_loader.sae_formats.names import need_site
from vllm.model_executor.model_loader.sae_formats.tensor_types import FloatType
from vllm.model_executor.model_loader.sae_loader import inspect_module, read_layout


@contextmanager
def at_asked_site(
    path: str, sites: Sequence[str] | None
) -> Iterator[tuple[str, Sequence[str] | None]]:
    """The path and the sites to measure.

    If an SAE has one site and another one is asked for, the SAE is written, folded, as
    a native directory for that other site. The directory lasts as long as the block. A
    note says so.

    Raises:
        ValueError: the module is refused, or has several sites and none of them is
            the one that is asked for.
    """
    try:
        read_layout("module", path, sites)
    except ValueError:
        if sites is None or len(sites) != 1:
            raise
        layout = read_layout("module", path)  # refused for another reason: says so
        if len(layout.sites) != 1 or layout.kind != "sae":
            raise
    else:
        yield path, sites
        return
    module = inspect_module("module", path)
    (stated,) = module.sites
    layer, hook = need_site(sites[0], "sites")
    asked = site_name(hook, layer)
    print(f"note: the files say {stated.name}; measured at {asked}", file=sys.stderr)
    content = LoadedSites(module, layout, FloatType.F32)[stated.layer, stated.hook]
    with tempfile.TemporaryDirectory(prefix="vllm-steering-probe-") as folder:
        write(folder, {(layer, hook): content}, module, layout)
        yield folder, None
