# SPDX-License-Identifier: Apache-2.0
"""What the author of an SAE has measured of it: `evidence.json` beside the weights.

    {"card": {"fvu": 0.1, "l0": 40, "ce_plain": 2.0, "ce_reconstructed": 2.1},
     "neuronpedia": "gemma-2-2b/20-gemmascope-res-16k",
     "max": [...], "p50": [...], "frequency": [...],
     "contexts": {"457": [["text before", " token", " text after"], ...]}}

Every key is optional; the lists have one number for each feature.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

from vllm.config.steering_json import Json
from vllm.entrypoints.serve.steering.access import RequestRefused

FILE = "evidence.json"
MAX_BYTES = 32 << 20
MAX_INDICES = 256
LISTS = ("max", "p50", "frequency")


def of_features(module_path: str, indices: list[int]) -> Json:
    """The card, and what is known of `indices`; empty where there is no file.

    Args:
        module_path: of the module, as the engine has it.

    Raises:
        RequestRefused: 500, the file is no JSON object.
    """
    path = Path(module_path) / FILE
    try:
        stat = path.stat()
    except (OSError, ValueError):
        return {"card": {}, "features": {}}
    content = _read(path, stat.st_mtime_ns, stat.st_size)
    card = content.get("card")
    return {
        "card": card if isinstance(card, dict) else {},
        "features": {str(i): _of_feature(content, i) for i in indices},
    }


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
            f"index: expected at most {MAX_INDICES} feature indices, comma-separated",
            "index",
        )
    return [int(part) for part in parts]


@functools.lru_cache(maxsize=8)
def _read(path: Path, changed: int, size: int) -> Json:
    """The file; `changed` is a part of the key, so that a new file is read."""
    try:
        content = json.loads(path.read_bytes()) if size <= MAX_BYTES else None
    except (OSError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise RequestRefused(
            500, f"{FILE}: expected a JSON object of at most {MAX_BYTES} bytes"
        )
    return content


def _of_feature(content: Json, index: int) -> Json:
    found: Json = {}
    for key in LISTS:
        values = content.get(key)
        if isinstance(values, list) and index < len(values):
            found[key] = values[index]
    contexts = content.get("contexts")
    if isinstance(contexts, dict) and str(index) in contexts:
        found["contexts"] = contexts[str(index)]
    if isinstance(content.get("neuronpedia"), str):
        found["neuronpedia"] = content["neuronpedia"]
    return found
