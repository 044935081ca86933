# SPDX-License-Identifier: Apache-2.0
"""EleutherAI sparsify: `cfg.json` and `sae.safetensors`, one directory per hook point.

TopK after ReLU; the encoder (`encoder.weight [F, D]`) reads `x - b_dec`, and `W_dec`
is `[F, D]`. The directory's name is the hook point: `layers.N` (or `h.N`) is the
output of block N. Source: https://github.com/EleutherAI/sparsify
"""

from __future__ import annotations

from vllm.config.steering import Activation, HookPoint, SiteInfo
from vllm.model_executor.model_loader.sae_formats.fold import matrix_shape
from vllm.model_executor.model_loader.sae_formats.layout import (
    Fields,
    LayoutError,
    Location,
    Matrix,
    ModuleLayout,
    SAELayout,
    parse_site_name,
    read_json,
)
from vllm.model_executor.model_loader.sae_formats.tensor_files import open_tensors

CONFIG = "cfg.json"
WEIGHTS = "sae.safetensors"


def matches(location: Location) -> bool:
    return location.has(CONFIG, WEIGHTS)


def read(location: Location) -> ModuleLayout:
    """Layout of a sparsify directory."""
    cfg = Fields(read_json(location.root / CONFIG), CONFIG)
    refused = {
        "transcode": "a transcoder is not an SAE",
        "skip_connection": "an SAE has no skip path",
        "signed": "selection by magnitude does not fold",
    }
    for key, reason in refused.items():
        if cfg.boolean(key, False):
            raise cfg.fail(key, f"false ({reason})")
    if cfg.text("activation") not in (None, "topk"):
        raise cfg.fail("activation", "topk")
    k = cfg.need_integer("k", 1)
    layer, hook = location.site(_site(location), f"{location.origin}: layers.N")
    with open_tensors(location.root / WEIGHTS) as tensors:
        if "W_skip" in tensors.infos:
            raise LayoutError(f"{WEIGHTS}: W_skip: an SAE has no skip path")
        W_dec = Matrix("W_dec")
        F, D = matrix_shape(tensors, W_dec)
    if cfg.integer("d_in", 1, D) != D:
        raise cfg.fail("d_in", f"{D}, which {WEIGHTS} has for W_dec")
    if k > F:
        raise cfg.fail("k", f"at most {F}")
    layout = SAELayout(
        site=SiteInfo(layer, hook, D, F, Activation.TOPK, k),
        file=WEIGHTS,
        W_enc=Matrix("encoder.weight"),
        W_dec=W_dec,
        b_enc="encoder.bias",
        subtract_b_dec=True,
    )
    return ModuleLayout(kind="sae", sites=(layout,))


def _site(location: Location) -> tuple[int, HookPoint] | None:
    name = location.origin.rstrip("/").rsplit("/", 1)[-1]
    if (site := parse_site_name(name)) is not None:
        return site
    if name.startswith(("layers.", "h.", "embed")):
        raise LayoutError(
            f"{name}: expected a hook point of the residual stream, such as layers.5"
        )
    return None
