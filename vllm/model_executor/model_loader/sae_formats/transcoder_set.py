# SPDX-License-Identifier: Apache-2.0
"""Transcoder sets: `config.yaml` and one `layer_N.safetensors` for each layer.

Transcoders of circuit-tracer's layout (mwhanna's for Qwen3): `W_enc [F, D]`,
`b_enc`, `W_dec [F, D]`, `b_dec`, ReLU or, with `threshold`, JumpReLU, and `W_skip
[d_out, d_in]` where there is a skip connection. They read what the MLP reads and give
what it writes. Source: https://github.com/safety-research/circuit-tracer
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from vllm.config.steering import Activation
from vllm.model_executor.model_loader.sae_formats.fold import matrix_shape
from vllm.model_executor.model_loader.sae_formats.layout import (
    LFS_POINTER,
    Fields,
    LayoutError,
    Location,
    Matrix,
    ModuleLayout,
    SAELayout,
    each_key_once,
    lfs_pointer,
)
from vllm.model_executor.model_loader.sae_formats.names import (
    OWN_OUTPUTS,
    choose_points,
    need_points,
    transcoder_points,
)
from vllm.model_executor.model_loader.sae_formats.tensor_files import open_tensors

CONFIG = "config.yaml"
# A YAML parser is slow; these files have a few lines.
MAX_YAML_BYTES = 64 << 10
_FILE = re.compile(r"layer_([0-9]{1,9})\.safetensors")
_TENSORS = {"W_enc", "W_dec", "b_enc", "b_dec"}
_POINTS_IN = ("mlp.hook_in", "mlp_in", "ln2.hook_normalized")
_POINTS_OUT = ("hook_mlp_out", "mlp.hook_out", "mlp_out")


def matches(location: Location) -> bool:
    return bool(_files(location))


def _files(location: Location) -> list[Path]:
    if location.root.is_dir() and not location.has(CONFIG):
        return []
    files = location.entries()
    return [p for p in files if _FILE.fullmatch(p.name) and p.is_file()]


def read(location: Location) -> ModuleLayout:
    """Layout of a transcoder set, or of one of its files."""
    config = _read_config(location)
    layouts = [_read_file(location, config, path) for path in _files(location)]
    layouts.sort(key=lambda entry: entry.site.layer)
    return ModuleLayout(
        kind="sae", sites=tuple(layouts), model=config.text("model_name")
    )


def _read_file(location: Location, config: Fields, path: Path) -> SAELayout:
    match = _FILE.fullmatch(path.name)
    assert match is not None
    for key, known in (
        ("feature_input_hook", _POINTS_IN),
        ("feature_output_hook", _POINTS_OUT),
    ):
        if (name := config.text(key)) not in (None, *known):
            # Raises for names that are known and mean another point.
            need_points(f"blocks.{match[1]}.{name}", None, f"{CONFIG}: {key}")
            raise config.fail(key, f"one of {', '.join(known)}")
    where = f"{path.name}: transcoder"
    before_gain = config.text("feature_input_hook") == "ln2.hook_normalized"
    raw_output = config.text("feature_output_hook") in OWN_OUTPUTS
    stated = replace(
        transcoder_points(int(match[1]), before_gain), raw_output=raw_output
    )
    points = choose_points(location, stated, where)
    W_enc, W_dec = Matrix("W_enc"), Matrix("W_dec")
    with open_tensors(path) as tensors:
        if not set(tensors.infos) >= _TENSORS:
            raise LayoutError(f"{path.name}: expected {', '.join(sorted(_TENSORS))}")
        F, d_in = matrix_shape(tensors, W_enc)
        _, d_out = matrix_shape(tensors, W_dec)
        has_skip = "W_skip" in tensors.infos
        has_threshold = "threshold" in tensors.infos
    activation = Activation.JUMPRELU if has_threshold else Activation.RELU
    return SAELayout(
        site=points.site(d_in, F, activation, None, d_out, has_skip),
        file=path.name,
        W_enc=W_enc,
        W_dec=W_dec,
        threshold="threshold" if has_threshold else None,
        W_skip=Matrix("W_skip") if has_skip else None,
    )


def _read_config(location: Location) -> Fields:
    """The set's `config.yaml`; empty where there is none beside a single file."""
    root = location.root
    path = (root if root.is_dir() else root.parent) / CONFIG
    if not path.is_file():
        return Fields({}, CONFIG)
    # Deferred: only this format needs it. vLLM depends on it.
    import yaml

    content = path.read_bytes()[: MAX_YAML_BYTES + 1]
    if content.startswith(LFS_POINTER):
        raise lfs_pointer(CONFIG)
    if len(content) > MAX_YAML_BYTES:
        raise LayoutError(
            f"{CONFIG}: expected at most {MAX_YAML_BYTES} bytes, found more"
        )
    try:
        data = yaml.safe_load(content)
        if isinstance(data, dict):
            # PyYAML, too, takes the second of two equal keys.
            node = yaml.compose(content, yaml.SafeLoader)
            each_key_once([(key.value, None) for key, _ in node.value])
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        detail = (str(error).splitlines() or [""])[0]
        raise LayoutError(f"{CONFIG}: cannot be read as YAML: {detail}") from error
    if not isinstance(data, dict):
        raise LayoutError(f"{CONFIG}: expected a mapping")
    return Fields(data, CONFIG)
