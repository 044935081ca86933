# SPDX-License-Identifier: Apache-2.0
"""What the author of an SAE has measured of it: `evidence.json` beside the weights.

    {"card": {"fvu": 0.1, "l0": 40, "ce_plain": 2.0, "ce_reconstructed": 2.1},
     "neuronpedia": "gemma-2-2b/20-gemmascope-res-16k",
     "sites": {"post_block.20": {"fvu": 0.1, "l0": 40}},
     "max": [...], "p99": [...], "p50": [...], "frequency": [...],
     "contexts": {"457": [["text before", " token", " text after"], ...]}}

Every key is optional; the lists have one number for each feature. Of a module with
several sites, the lists and contexts of a site stand beside its `fvu` and `l0`. If the
file leaves out the sites or the Neuronpedia id, they come from a native manifest or a
SAELens configuration.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from vllm.config.sae_labels import EVIDENCE_NAME, MAX_EVIDENCE
from vllm.config.steering_checks import shown
from vllm.config.steering_json import Json
from vllm.config.unicode_text import holds_halves
from vllm.entrypoints.serve.steering.access import RequestRefused
from vllm.entrypoints.serve.steering.file_cache import FileCache

MAX_INDICES = 256
CONTEXTS = "contexts"
LISTS = ("max", "p99", "p50", "frequency")
FIGURES = ("fvu", "l0")


def of_features(module_path: str, indices: list[int], site: str | None = None) -> Json:
    """The card, the sites, and what is known of the features `indices`.

    Args:
        module_path: of the module, as the engine has it.
        site: whose features they are, `hook.layer`; that of the whole module if None.

    Raises:
        RequestRefused: 409, the file is no JSON object, or contains NaN.
    """
    folder = Path(module_path)
    content = _content(folder / EVIDENCE_NAME) or {}
    card, sites = content.get("card"), content.get("sites")
    id_ = content.get("neuronpedia")
    if not isinstance(id_, str):
        id_ = _neuronpedia_id(_stand_in(folder / "cfg.json"))
    by_site = {n: told for n, told in _items(sites) if isinstance(told, dict)}
    own = by_site.get(site or "", {})
    features = {
        str(i): {**_of_feature(content, i), **_of_feature(own, i)} for i in indices
    }
    if id_ is not None:
        features = {i: {**known, "neuronpedia": id_} for i, known in features.items()}
    return {
        "card": card if isinstance(card, dict) else {},
        "sites": {name: _figures(told) for name, told in _items(sites)}
        if isinstance(sites, dict)
        else _declared(_stand_in(folder / "manifest.json")),
        "features": features,
    }


def _items(sites: object) -> list[tuple[str, object]]:
    return list(sites.items()) if isinstance(sites, dict) else []


def _figures(told: object) -> object:
    """What the file says of a site, without what it says of the site's features."""
    if not isinstance(told, dict):
        return told
    return {key: told[key] for key in told if key not in (*LISTS, CONTEXTS)}


def _content(path: Path) -> Json | None:
    """The JSON object in a file, or None if there is no file."""
    try:
        return _FILES.get(path)
    except (OSError, ValueError):
        raise RequestRefused(
            409,
            f"{path.name}: found no JSON object of at most {MAX_EVIDENCE} bytes, or "
            "one with NaN, infinity or broken characters",
        ) from None


def _stand_in(path: Path) -> Json:
    """As `_content`, but a file that holds no JSON object counts as empty."""
    try:
        return _content(path) or {}
    except RequestRefused:
        return {}


def _declared(manifest: Json) -> Json:
    """FVU and L0 by site, as a native manifest declares them."""
    found: Json = {}
    sites = manifest.get("sites")
    for site in sites if isinstance(sites, list) else []:
        if isinstance(site, dict):
            told = {key: site[key] for key in FIGURES if key in site}
            if told:
                found[f"{site.get('hook')}.{site.get('layer')}"] = told
    return found


def _neuronpedia_id(config: Json) -> str | None:
    """The id in a SAELens configuration, at the top or in its metadata."""
    metadata = config.get("metadata")
    for place in (config, metadata if isinstance(metadata, dict) else {}):
        if isinstance(place.get("neuronpedia_id"), str):
            return place["neuronpedia_id"]
    return None


def parse_indices(text: str | None) -> list[int]:
    """`"3,457"` -> `[3, 457]`; nothing: none.

    Raises:
        RequestRefused: 400.
    """
    parts = [part for part in (text or "").split(",") if part]
    good = all(part.isascii() and part.isdecimal() for part in parts)
    if not good or len(parts) > MAX_INDICES or any(len(part) > 9 for part in parts):
        raise RequestRefused(
            400,
            f"index: found {shown(text)}, expected at most {MAX_INDICES} feature "
            "indices, separated by commas",
            "index",
        )
    return [int(part) for part in parts]


def _read(path: Path) -> Json:
    """The JSON object in a file, if an answer can have it.

    An answer cannot have NaN, infinity or half of a surrogate pair.

    Raises:
        ValueError: it cannot, or there is no such object.
    """
    if path.stat().st_size > MAX_EVIDENCE:
        raise ValueError("too large")
    data = path.read_bytes()
    try:
        content = json.loads(data, parse_float=_finite, parse_constant=_finite)
    except RecursionError:
        raise ValueError("nested too deep") from None
    if holds_halves(data):
        raise ValueError("no Unicode")
    if not isinstance(content, dict):
        raise ValueError("no object")
    return content


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no JSON number")
    return number


_FILES = FileCache(_read)


def _of_feature(content: Json, index: int) -> Json:
    found: Json = {}
    for key in LISTS:
        values = content.get(key)
        if isinstance(values, list) and index < len(values):
            found[key] = values[index]
    contexts = content.get(CONTEXTS)
    if isinstance(contexts, dict) and str(index) in contexts:
        found[CONTEXTS] = contexts[str(index)]
    return found
