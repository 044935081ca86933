# SPDX-License-Identifier: Apache-2.0
"""The native directory: `manifest.json` and one safetensors file per site.

Tensors are canonical already (`W_enc [F, d_in]`, `b_enc`, `threshold` for JumpReLU,
`W_dec [F, d_out]`, `b_dec`, and `W_skip [d_out, d_in]` where a transcoder has one), so
loading folds nothing and a round trip keeps every bit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

import numpy as np

from vllm.config.steering import Activation, SiteInfo
from vllm.config.steering_checks import Array, shown
from vllm.config.steering_json import Json, JsonView
from vllm.config.steering_points import (
    HOOK_ALIASES,
    HOOK_NAMES,
    HookPoint,
    place_of,
    site_name,
    site_text,
)
from vllm.config.steering_written_files import whole_file
from vllm.model_executor.model_loader.sae_formats.layout import (
    Fields,
    LayoutError,
    Location,
    Matrix,
    ModuleLayout,
    SAELayout,
    read_json,
)
from vllm.model_executor.model_loader.sae_formats.safetensors_file import (
    write_safetensors,
)
from vllm.model_executor.model_loader.sae_formats.tensor_types import (
    FloatType,
    HostTensor,
)

if TYPE_CHECKING:
    import torch

FORMAT = "vllm-sae"
VERSION = 1
MANIFEST = "manifest.json"
_TENSORS = ("W_enc", "b_enc", "threshold", "W_dec", "b_dec", "W_skip")
_OPTIONAL_TENSORS = ("threshold", "W_skip")
# What a site can say of the activations that its SAE was trained on: see `SiteInfo`.
SITE_FLAGS = ("before_gain", "raw_output", "before_value_bias")
_SITE_KEYS = frozenset(
    [
        "layer",
        "hook",
        "d_model",
        "hook_out",
        "d_out",
        "has_skip",
        *SITE_FLAGS,
        "d_sae",
        "activation",
        "k",
        "topk_relu",
        "file",
        "dtype",
        "fvu",
        "l0",
    ]
)
# What `save_native` copies to the manifest.
_COPIED_KEYS = ("k", "topk_relu", "fvu", "l0", *SITE_FLAGS)
_KEYS = frozenset(
    [
        "format",
        "version",
        "sites",
        "reference_norm",
        "skip_token_ids",
        "norm_guard",
        "model",
    ]
)


def matches(location: Location) -> bool:
    return location.has(MANIFEST)


def read(location: Location) -> ModuleLayout:
    """Layout of a native directory; every key of its manifest is checked."""
    fields = Fields(read_json(location.root / MANIFEST), MANIFEST)
    if fields.data.get("format") != FORMAT:
        raise fields.fail("format", repr(FORMAT))
    if fields.data.get("version") != VERSION:
        raise fields.fail("version", str(VERSION))
    _refuse_unknown(fields, _KEYS)
    entries = fields.data.get("sites")
    if not isinstance(entries, list) or not entries:
        raise fields.fail("sites", "a list of at least one site")
    sites: dict[tuple[int, HookPoint], SAELayout] = {}
    declared: dict[str, dict[str, float]] = {}
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise LayoutError(f"{MANIFEST}: sites[{i}]: expected an object")
        where = Fields(entry, f"{MANIFEST}: sites[{i}]")
        layout = _read_site(where)
        key = (layout.site.layer, layout.site.hook)
        if key in sites:
            raise LayoutError(f"{where.where}: {layout.site.name} appears twice")
        sites[key] = layout
        claims = {name: where.number(name, positive=False) for name in ("fvu", "l0")}
        declared[layout.site.name] = {k: v for k, v in claims.items() if v is not None}
    skip = _read_skip_token_ids(fields)
    return ModuleLayout(
        kind="sae",
        sites=tuple(sites.values()),
        reference_norm=fields.number("reference_norm"),
        skip_token_ids=skip,
        norm_guard=fields.number("norm_guard"),
        model=fields.text("model"),
        declared=declared,
    )


def _refuse_unknown(fields: Fields, known: frozenset[str]) -> None:
    if unknown := sorted(set(fields.data) - known):
        raise LayoutError(
            f"{fields.where}: {unknown[0]}: unknown key, expected one of "
            f"{', '.join(sorted(known))}"
        )


def _read_skip_token_ids(fields: Fields) -> tuple[int, ...] | None:
    ids = fields.data.get("skip_token_ids")
    if ids is None:
        return None
    if not isinstance(ids, list) or any(type(i) is not int or i < 0 for i in ids):
        raise fields.fail("skip_token_ids", "a list of token ids")
    return tuple(ids)


def _read_site(fields: Fields) -> SAELayout:
    _refuse_unknown(fields, _SITE_KEYS)
    hook = _read_hook(fields, "hook")
    if hook is None:
        raise fields.fail("hook", f"one of {HOOK_NAMES}")
    activation = fields.text("activation")
    if activation not in [a.value for a in Activation]:
        raise fields.fail("activation", f"one of {', '.join(Activation)}")
    file = fields.text("file")
    if file is None or not re.fullmatch(r"[\w-][\w.-]*\.safetensors", file):
        raise fields.fail("file", "a safetensors file name beside the manifest")
    is_topk = activation == Activation.TOPK
    d_sae = fields.need_integer("d_sae", 1)
    k = fields.need_integer("k", 1) if is_topk else None
    if k is not None and k > d_sae:
        raise fields.fail("k", f"at most {d_sae}")
    site = SiteInfo(
        layer=fields.need_integer("layer"),
        hook=hook,
        d_in=fields.need_integer("d_model", 1),
        d_sae=d_sae,
        activation=Activation(activation),
        k=k,
        topk_relu=fields.boolean("topk_relu", True),
        hook_out=_read_hook(fields, "hook_out"),
        d_out=fields.integer("d_out", 1),
        has_skip=fields.boolean("has_skip", False),
        before_gain=fields.boolean("before_gain", False),
        raw_output=fields.boolean("raw_output", False),
        before_value_bias=fields.boolean("before_value_bias", False),
    )
    if site.before_gain and site.hook is not HookPoint.MLP_IN:
        raise fields.fail("before_gain", "false, since the site is not mlp_in")
    if site.before_value_bias and site.hook is not HookPoint.ATTN_Z:
        raise fields.fail("before_value_bias", "false, since the site is not attn_z")
    if not site.is_transcoder and (site.out_width != site.d_in or site.has_skip):
        raise fields.fail("hook_out", "another point than hook, with d_out or has_skip")
    return SAELayout(
        site=site,
        file=file,
        W_enc=Matrix("W_enc"),
        W_dec=Matrix("W_dec"),
        threshold="threshold" if activation == Activation.JUMPRELU else None,
        W_skip=Matrix("W_skip") if site.has_skip else None,
    )


def _read_hook(fields: Fields, key: str) -> HookPoint | None:
    name = fields.text(key)
    if name is None:
        return None
    if name not in HOOK_ALIASES:
        raise fields.fail(key, f"one of {HOOK_NAMES}")
    return HOOK_ALIASES[name]


def _activation_of(name: str, content: JsonView, has_threshold: bool) -> Activation:
    """What a site's content says, or what its tensors imply."""
    given = content.get("activation")
    if given is None:
        return Activation.JUMPRELU if has_threshold else Activation.RELU
    kinds = [one.value for one in Activation]
    if given not in kinds:
        raise ValueError(
            f"{name}: activation: found {shown(given)}, expected one of "
            f"{', '.join(kinds)}"
        )
    activation = Activation(given)
    if has_threshold != (activation is Activation.JUMPRELU):
        raise ValueError(
            f"{name}: threshold: expected with jumprelu and nothing else, found "
            f"activation {activation.value}"
        )
    return activation


# A site: `"hook.layer"`, `(layer, hook)` or `(hook, layer)`.
SiteKey = TypeVar("SiteKey", bound=str | tuple[int, str] | tuple[str, int])


def save_native(
    path: str | Path,
    sites: Mapping[SiteKey, JsonView],
    *,
    reference_norm: float | None = None,
    skip_token_ids: Sequence[int] | None = None,
    norm_guard: float | None = None,
    model: str | None = None,
) -> None:
    """Write a native directory, making it if needed.

    Args:
        path: the directory.
        sites: `"hook.layer"`, `(layer, hook)` or `(hook, layer)` -> `W_enc [F, D]`,
            `b_enc [F]`, `W_dec [F, D]`, `b_dec [D]`, `threshold [F]` for JumpReLU (all
            floating; tensors of PyTorch, arrays of NumPy, or `HostTensor`s), and
            optional `activation` (default: jumprelu with a threshold, else relu), `k`,
            `topk_relu`, and what the author measured: `fvu`, `l0`. A transcoder has
            `hook_out`, `W_enc [F, d_in]`, `W_dec [F, d_out]`, `b_dec [d_out]` and may
            have `W_skip [d_out, d_in]`.
        reference_norm: typical L2 norm of the model's activations at these sites.
        skip_token_ids: tokens to leave untouched; None for the model's bos, eos, pad.
        norm_guard: leave tokens with a norm above this multiple of `reference_norm`.
        model: name of the model that the SAE was trained on.

    Raises:
        ValueError: a key names no site, or the same as another; a tensor is missing,
            has another shape, or is not floating; or `activation` is unknown.
    """
    root = Path(path)
    root.mkdir(parents=True, exist_ok=True)
    entries: list[Json] = []
    for site, content in sites.items():
        layer, point = _place(site)
        name = site_name(point, layer)
        if any(entry["file"] == f"{name}.safetensors" for entry in entries):
            raise ValueError(f"sites: found {name} twice, expected it once")
        tensors = {
            key: _on_host(f"{name}: {key}", content[key])
            for key in _TENSORS
            if content.get(key) is not None
        }
        _check_shapes(name, tensors)
        activation = _activation_of(name, content, "threshold" in tensors)
        F, D = tensors["W_enc"].data.shape
        entry: Json = {
            "layer": layer,
            "hook": point.value,
            "d_model": D,
            "d_sae": F,
            "activation": activation.value,
            "file": f"{name}.safetensors",
            "dtype": tensors["W_enc"].dtype.value,
        }
        if content.get("hook_out") is not None:
            entry["hook_out"] = HookPoint(content["hook_out"]).value
            entry["d_out"] = tensors["W_dec"].data.shape[1]
            entry["has_skip"] = "W_skip" in tensors
        for key in _COPIED_KEYS:
            if content.get(key) is not None:
                entry[key] = content[key]
        # Check the manifest by the reader's own rules, so that the reader will accept
        # it.
        _read_site(Fields(entry, name))
        write_safetensors(root / entry["file"], tensors)
        entries.append(entry)
    manifest: Json = {"format": FORMAT, "version": VERSION, "sites": entries}
    optional = {
        "reference_norm": reference_norm,
        "skip_token_ids": None if skip_token_ids is None else list(skip_token_ids),
        "norm_guard": norm_guard,
        "model": model,
    }
    manifest.update({k: v for k, v in optional.items() if v is not None})
    # Written last, so that an interrupted write leaves no new directory that looks
    # complete.
    with whole_file(root / MANIFEST) as stream:
        stream.write(f"{json.dumps(manifest, indent=2)}\n".encode())


def _place(key: object) -> tuple[int, HookPoint]:
    """The layer and the point of a site, in any of the forms of `save_native`."""
    if isinstance(key, tuple) and len(key) == 2 and isinstance(key[1], str):
        key = (key[1], key[0])
    found = place_of(key)
    if found is None:
        raise ValueError(
            f"sites: found {shown(site_text(key))}, expected HOOK.LAYER such as "
            f"post_block.20, or (layer, hook), with one of {HOOK_NAMES}"
        )
    return found


def _on_host(what: str, value: object) -> HostTensor:
    """A tensor of any device in host memory."""
    if isinstance(value, HostTensor):
        return value
    if not isinstance(value, Array):
        raise ValueError(f"{what}: expected a floating tensor, found {shown(value)}")
    stored_as = str(value.dtype).removeprefix("torch.")
    if stored_as not in [kind.value for kind in FloatType]:
        raise ValueError(f"{what}: expected a floating tensor, found {stored_as}")
    dtype = FloatType(stored_as)
    if isinstance(value, np.ndarray):
        return HostTensor(np.ascontiguousarray(value), dtype)
    plain = cast("torch.Tensor", value).detach().cpu().contiguous()
    if dtype is FloatType.BF16:
        import torch

        return HostTensor(plain.view(torch.uint16).numpy(), dtype)
    return HostTensor(plain.numpy(), dtype)


def _check_shapes(name: str, tensors: Mapping[str, HostTensor]) -> None:
    for key in _TENSORS:
        if key not in tensors and key not in _OPTIONAL_TENSORS:
            raise ValueError(f"{name}: {key}: expected a tensor, found none")
    for key in ("W_enc", "W_dec"):
        shape = list(tensors[key].data.shape)
        if len(shape) != 2:
            raise ValueError(f"{name}: {key}: expected a matrix [F, D], found {shape}")
    F, d_out = tensors["W_dec"].data.shape
    d_in = tensors["W_enc"].data.shape[1]
    shapes = {
        "W_enc": (F, d_in),
        "b_enc": (F,),
        "threshold": (F,),
        "W_dec": (F, d_out),
        "b_dec": (d_out,),
        "W_skip": (d_out, d_in),
    }
    for key, tensor in tensors.items():
        if tensor.data.shape != shapes[key]:
            raise ValueError(
                f"{name}: {key}: expected floating {list(shapes[key])}, found "
                f"{tensor.dtype.value} {list(tensor.data.shape)}"
            )
