# SPDX-License-Identifier: Apache-2.0
"""Vectors that a request brings itself, at sites where the engine reserved room.

Such a vector is a module with one site and one request, whose name and digest come from
its content. So clamps, digests, row sharing and presets treat it like any vector
module.
"""

from __future__ import annotations

import base64
import binascii
import hashlib

import numpy as np
import torch

from vllm.config.steering import InlineSite, ModuleInfo, SiteInfo, SteeringConfig
from vllm.config.steering_checks import bad, refusal
from vllm.config.steering_points import HookPoint, site_name

# The names of other modules may not begin with this.
INLINE_PREFIX = "inline:"
OPTION = "additional_config.steering.inline_vectors"
# Characters of base64: 196 608 numbers of float32, wider than any model.
_MAX_TEXT = 1 << 20
# Bytes of a component, by the vector's dtype.
_FLOAT32, _FLOAT16 = 4, 2

# The norms whose square is a normal float32 number.
_SMALLEST_NORM, _LARGEST_NORM = 2.0**-60, 2.0**63


def vector_text(values: torch.Tensor | np.ndarray, path: str = "vector") -> str:
    """A vector `[D]` as requests write it: base64 of little-endian numbers.

    Float16 stays float16, every other type becomes float32.

    Raises:
        VLLMValidationError: it is not a list of real numbers.
    """
    array: np.ndarray
    if isinstance(values, torch.Tensor):
        kept = torch.float16 if values.dtype == torch.float16 else torch.float32
        if values.is_complex():
            raise refusal(path, f"found {values.dtype}, expected real numbers")
        array = values.detach().to("cpu", kept).numpy()
    else:
        array = values
    if array.ndim != 1 or array.dtype.kind not in "fiu":
        raise refusal(
            path,
            f"found an array of {array.dtype} {list(array.shape)}, expected real "
            "numbers [D]",
        )
    with np.errstate(over="ignore"):
        exact: np.ndarray = array.astype("<f2" if array.dtype == np.float16 else "<f4")
    return base64.b64encode(exact.tobytes()).decode()


def with_text(path: str, specs: object) -> object:
    """The given specs, with a vector's text in place of its tensor or array."""
    if not isinstance(specs, (list, tuple)):
        return specs
    found: list[object] = []
    for at, spec in enumerate(specs):
        given = spec.get("vector") if isinstance(spec, dict) else None
        if isinstance(given, (torch.Tensor, np.ndarray)):
            text = vector_text(given, f"{path}[{at}].vector")
            spec = {**spec, "vector": text}
        found.append(spec)
    return found


def refuse_long_text(path: str, spec: object) -> None:
    """Raise for a vector that no model is wide enough for, before it is read."""
    text = spec.get("vector") if isinstance(spec, dict) else None
    if isinstance(text, str) and len(text) > _MAX_TEXT:
        raise refusal(
            f"{path}.vector",
            f"found {len(text)} characters, expected at most {_MAX_TEXT}",
        )


def read_vector(path: str, text: str, width: int) -> bytes:
    """The vector's components: little-endian float32, `-0.0` as `0.0`.

    Args:
        path: of the field, for messages.
        text: base64 of little-endian float16 or float32 `[D]`; the length decides.
        width: D of the site.

    Raises:
        VLLMValidationError: the text is something else, or a component is not finite.
    """
    accepted = (
        f"base64 of {width} little-endian float16 or float32 numbers "
        f"({_FLOAT16 * width} or {_FLOAT32 * width} bytes)"
    )
    # Counted before anything is decoded.
    if len(text) > 4 * ((_FLOAT32 * width + 2) // 3):
        found = f"{len(text)} characters ({3 * len(text) // 4} bytes or fewer)"
        raise refusal(path, f"found {found}, expected {accepted}")
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise bad(path, text, accepted) from None
    if len(data) not in (_FLOAT16 * width, _FLOAT32 * width):
        raise refusal(path, f"found {len(data)} bytes, expected {accepted}")
    kind = "<f4" if len(data) == _FLOAT32 * width else "<f2"
    values = np.frombuffer(data, dtype=kind).astype("<f4")
    wrong = np.flatnonzero(~np.isfinite(values))
    if wrong.size:
        at = int(wrong[0])
        raise refusal(
            path, f"found {values[at]} at position {at}, expected finite numbers"
        )
    return (values + np.float32(0.0)).astype("<f4").tobytes()


def refuse_no_direction(path: str, data: bytes) -> None:
    """Raise unless a vector has a direction: float32 holds its squared norm."""
    norm = float(np.linalg.norm(np.frombuffer(data, "<f4").astype(np.float64)))
    if not _SMALLEST_NORM <= norm <= _LARGEST_NORM:
        raise refusal(
            path,
            f"found the norm {norm:.6g}, expected {_SMALLEST_NORM:.6g} to "
            f"{_LARGEST_NORM:.6g} for this kind, which acts along the unit vector",
        )


def as_text(data: bytes) -> str:
    """The inverse of `read_vector`: the vector as a request writes it."""
    return base64.b64encode(data).decode()


def as_module(site: InlineSite, data: bytes) -> ModuleInfo:
    """The module that stands for a vector at a site."""
    digest = hashlib.sha256(data).hexdigest()
    return ModuleInfo(
        name=f"{INLINE_PREFIX}{site.name}:{digest}",
        kind="vectors",
        path="",
        format="inline",
        digest=digest,
        sites=(SiteInfo(site.layer, site.hook, site.width, 1),),
        skip_token_ids=(),
    )


def reserved_site(
    path: str, hook: HookPoint, layer: int, config: SteeringConfig
) -> InlineSite:
    """The site with room for inline vectors that a spec names.

    Raises:
        VLLMValidationError: the engine reserved none there.
    """
    for site in config.inline_sites:
        if (site.layer, site.hook) == (layer, hook):
            return site
    reserved = ", ".join(site.name for site in config.inline_sites)
    raise refusal(
        path,
        f"no room is reserved for vectors at {site_name(hook, layer)}, expected a site "
        f"of {OPTION}: {reserved or 'none is reserved'}",
    )


def too_many(path: str, site: InlineSite, found: int) -> Exception:
    """The error for a request that brings too many vectors to a site."""
    return refusal(
        path,
        f"found {found} different vectors at {site.name} in this request, expected at "
        f"most {site.per_request} ({OPTION})",
    )
