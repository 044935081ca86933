# SPDX-License-Identifier: Apache-2.0
"""SAELens directories: `cfg.json` and `sae_weights.safetensors`.

Both the layout of SAELens 6 (site under `metadata`) and the flat one before it.
`W_enc` is `[D, F]`, `W_dec` `[F, D]`. BatchTopK and Matryoshka SAEs are saved as
JumpReLU; their training checkpoints, with one scalar threshold, load too. Transcoders
have `W_skip [d_out, d_in]` where their architecture says `skip`.
Source: https://github.com/decoderesearch/SAELens (sae_lens/saes).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from vllm.config.steering import Activation
from vllm.config.steering_json import Json
from vllm.config.steering_points import RESIDUAL_HOOKS, HookPoint
from vllm.model_executor.model_loader.sae_formats.fold import (
    matrix_shape,
    read_floats,
)
from vllm.model_executor.model_loader.sae_formats.layout import (
    Fields,
    Gate,
    LayoutError,
    Location,
    Matrix,
    ModuleLayout,
    Overrides,
    SAELayout,
    excerpt,
    read_json,
)
from vllm.model_executor.model_loader.sae_formats.names import (
    Points,
    choose_points,
    need_points,
    need_site,
    parse_site_name,
)
from vllm.model_executor.model_loader.sae_formats.stated import need_k, refuse_unused
from vllm.model_executor.model_loader.sae_formats.tensor_files import open_tensors
from vllm.model_executor.model_loader.sae_formats.tensor_types import TensorFile

CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"
SCALER = "activation_scaler.json"
W_ENC = Matrix("W_enc", features_last=True)
W_DEC = Matrix("W_dec")
ARCHITECTURES = (
    "standard",
    "jumprelu",
    "topk",
    "batchtopk",
    "matryoshka_batchtopk",
    "gated",
)
AVERAGE = "expected_average_only_in"


def matches(location: Location) -> bool:
    return location.has(CONFIG, WEIGHTS)


def read(location: Location) -> ModuleLayout:
    """Layout of a SAELens directory."""
    cfg = Fields(read_json(location.root / CONFIG), CONFIG)
    metadata = cfg.sub("metadata") if "metadata" in cfg.data else cfg
    kind = _architecture(cfg)
    _refuse_what_cannot_fold(cfg, metadata, location.overrides, kind)
    with open_tensors(location.root / WEIGHTS) as tensors:
        F, d_in = matrix_shape(tensors, W_ENC)
        _, d_out = matrix_shape(tensors, W_DEC)
        sizes = {"d_sae": F, "d_in": d_in, "d_out": d_out}
        for key, size in sizes.items():
            if cfg.integer(key, 1, size) != size:
                raise cfg.fail(key, f"{size}, which {WEIGHTS} has")
        _refuse_finetuning(tensors)
        stated = _points(cfg, metadata, kind.transcodes)
        points = choose_points(location, stated, f"{CONFIG}: hook_name")
        points = _of_the_weights(metadata, points, location.overrides.centred)
        scale = _input_scale(cfg, metadata, location)
        k = need_k(cfg, F, tensors) if kind.k_in_config else kind.k
        layout = SAELayout(
            site=points.site(d_in, F, kind.activation, k, d_out, kind.skips),
            file=WEIGHTS,
            W_enc=W_ENC,
            W_dec=W_DEC,
            subtract_b_dec=not kind.transcodes
            and cfg.boolean("apply_b_dec_to_input", True),
            centre_input=location.overrides.centred,
            W_enc_scale=scale,
            W_dec_scale=1 / scale,
            b_dec_scale=1 / scale,
            W_skip=Matrix("W_skip") if kind.skips else None,
            **_encoder(kind.encoder, cfg, tensors, scale),
        )
        said = cfg.text("architecture") or kind.encoder
        refuse_unused(layout, tensors, f"{CONFIG} says {said}")
    return ModuleLayout(kind="sae", sites=(layout,), model=metadata.text("model_name"))


@dataclass(frozen=True)
class _Kind:
    """What an architecture's name says.

    `encoder` is the SAE architecture with the same encoder; `k` is TopK's of a
    configuration before SAELens 6, `k_in_config` says that the field `k` has it.
    """

    encoder: str
    transcodes: bool = False
    skips: bool = False
    k: int | None = None
    k_in_config: bool = False

    @property
    def activation(self) -> Activation:
        return _ACTIVATION[self.encoder]


TRANSCODERS = {
    "transcoder": _Kind("standard", transcodes=True),
    "skip_transcoder": _Kind("standard", transcodes=True, skips=True),
    "jumprelu_transcoder": _Kind("jumprelu", transcodes=True),
    "jumprelu_skip_transcoder": _Kind("jumprelu", transcodes=True, skips=True),
}
_ACTIVATION = {
    "standard": Activation.RELU,
    "topk": Activation.TOPK,
    **dict.fromkeys(
        ("jumprelu", "batchtopk", "matryoshka_batchtopk", "gated"), Activation.JUMPRELU
    ),
}


def _architecture(cfg: Fields) -> _Kind:
    """The architecture; before SAELens 6, TopK was an activation function."""
    architecture = cfg.text("architecture") or "standard"
    function = cfg.text("activation_fn") or cfg.text("activation_fn_str") or "relu"
    if function == "topk" and architecture in ("standard", "topk"):
        if cfg.data.get("k") is not None:
            return _Kind("topk", k_in_config=True)
        return _Kind("topk", k=cfg.sub("activation_fn_kwargs").need_integer("k", 1))
    if function not in ("relu", "topk"):
        raise cfg.fail(
            "activation_fn" if "activation_fn" in cfg.data else "activation_fn_str",
            "relu or topk",
        )
    if architecture in TRANSCODERS:
        return TRANSCODERS[architecture]
    if architecture not in ARCHITECTURES:
        known = ", ".join((*ARCHITECTURES, *TRANSCODERS))
        raise cfg.fail(
            "architecture",
            f"one that folds into an encoder and a decoder matrix ({known})",
        )
    return _Kind(architecture, k_in_config=architecture == "topk")


def _normalisation(cfg: Fields, overrides: Overrides) -> object:
    """How the input is normalised: what the release list says, else the files."""
    return overrides.normalize or cfg.data.get("normalize_activations")


def _refuse_what_cannot_fold(
    cfg: Fields, metadata: Fields, overrides: Overrides, kind: _Kind
) -> None:
    normalize = _normalisation(cfg, overrides)
    foldable = (None, False, True, "none", AVERAGE)
    if not any(normalize is ok or normalize == ok for ok in foldable):
        raise LayoutError(
            f"{CONFIG}: normalize_activations: expected none or {AVERAGE}, found "
            f"{excerpt(normalize)} (per-token normalisation and whitening cannot be "
            "folded)"
        )
    if kind.transcodes and (normalize is True or normalize == AVERAGE):
        raise cfg.fail("normalize_activations", "none for a transcoder")
    if kind.transcodes and cfg.boolean("apply_b_dec_to_input", False):
        raise cfg.fail("apply_b_dec_to_input", "false for a transcoder")
    if metadata.data.get("hook_head_index") is not None:
        raise metadata.fail("hook_head_index", "null (all heads side by side)")
    for key in ("hook_name_out", "hook_layer_out", "d_out"):
        fields = metadata if metadata.data.get(key) is not None else cfg
        if fields.data.get(key) is not None and not kind.transcodes:
            raise fields.fail(
                key, "no such key, since the architecture is not a transcoder"
            )


# What TransformerLens can do to a model's weights, and the points whose activations
# change by it.
_PROCESSING = {
    "center_writing_weights": (*RESIDUAL_HOOKS, HookPoint.ATTN_OUT, HookPoint.MLP_OUT),
    "refactor_factored_attn_matrices": (HookPoint.ATTN_Z,),
}


def _of_the_weights(metadata: Fields, points: Points, centred: bool) -> Points:
    """The points of a model whose weights may have been changed before the training.

    Args:
        centred: the release list says so, and the fold has it.

    Raises:
        LayoutError: they were changed in a way that is not folded.
    """
    done = metadata.sub("model_from_pretrained_kwargs")
    for key, changed in _PROCESSING.items():
        if centred and key == "center_writing_weights":
            continue
        if {points.hook, points.hook_out} & {*changed} and done.boolean(key, False):
            raise done.fail(
                key, f"false (it changes {points.hook.value}, and is not folded)"
            )
    without_bias = done.boolean("fold_value_biases", False)
    is_z = points.hook is HookPoint.ATTN_Z
    return replace(points, before_value_bias=without_bias and is_z)


def _refuse_finetuning(tensors: TensorFile) -> None:
    for name in ("scaling_factor", "finetuning_scaling_factor"):
        if name in tensors.infos and (read_floats(tensors, name) != 1).any():
            raise LayoutError(
                f"{tensors.label}: {name}: expected all ones, found other values"
            )


def _points(cfg: Fields, metadata: Fields, transcodes: bool) -> Points | None:
    """The points that the configuration states, or None if they are not clear."""
    key = "hook_name" if metadata.data.get("hook_name") is not None else "hook_point"
    name = metadata.text(key)
    if name is None:
        return None
    where = f"{metadata.where}: {key}"
    # Old configurations hold a template and the layer beside it.
    layer = metadata.integer("hook_layer")
    if layer is None:
        layer = metadata.integer("hook_point_layer")
    if layer is not None:
        name = name.replace("{layer}", str(layer))
    if (exact := metadata.text("hf_hook_name")) is not None and parse_site_name(exact):
        # A Hugging Face name is exact where TransformerLens's is not (hook_mlp_in).
        name = exact
    reshape = cfg.text("reshape_activations")
    if reshape not in (None, "none") and not (
        reshape == "hook_z" and need_site(name, where)[1] is HookPoint.ATTN_Z
    ):
        raise cfg.fail("reshape_activations", "none, or hook_z with a hook_z")
    if not transcodes:
        return need_points(name, None, where)
    name_out = metadata.text("hf_hook_name_out") or metadata.text("hook_name_out")
    if name_out is None:
        raise metadata.fail("hook_name_out", "the point that the transcoder writes")
    if parse_site_name(name_out) is None and metadata.text("hook_name_out"):
        name_out = metadata.text("hook_name_out")
    return need_points(name, name_out, where)


def _input_scale(cfg: Fields, metadata: Fields, location: Location) -> float:
    """The factor that the SAE's input was multiplied by in training, 1 if folded."""
    if _normalisation(cfg, location.overrides) not in (True, AVERAGE):
        return 1.0
    if location.overrides.scale is not None:
        return location.overrides.scale
    for fields in (cfg, metadata):
        if (scale := fields.number("norm_scaling_factor")) is not None:
            return scale
    if location.has(SCALER):
        fields = Fields(read_json(location.root / SCALER), SCALER)
        if (scale := fields.number("scaling_factor")) is not None:
            return scale
    raise LayoutError(
        f"{CONFIG}: norm_scaling_factor: normalize_activations is "
        f"expected_average_only_in, expected the factor here or in {SCALER} "
        "(scaling_factor), found neither; use saelens:RELEASE/SAE_ID if the SAE is in "
        "SAELens's list"
    )


def _encoder(architecture: str, cfg: Fields, tensors: TensorFile, scale: float) -> Json:
    """The fields of the layout that differ between architectures."""
    rescale = cfg.boolean("rescale_acts_by_decoder_norm", False)
    if architecture == "gated":
        return {"b_enc": None, "gate": Gate("r_mag", "b_mag", "b_gate")}
    if architecture == "jumprelu":
        return {"threshold": "threshold"}
    if architecture == "topk":
        return {"unit_decoder_rows": rescale}
    if architecture == "standard":
        return {}
    if "threshold" in tensors.infos:
        return {"threshold": "threshold"}
    # The training threshold is in units of the pre-activation times the norm of the
    # decoder row, and the row is divided by the input scale.
    return {
        "threshold": "topk_threshold",
        "unit_decoder_rows": rescale,
        "threshold_scale": 1 / scale if rescale else 1.0,
    }
