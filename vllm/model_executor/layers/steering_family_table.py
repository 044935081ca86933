# SPDX-License-Identifier: Apache-2.0
"""Where the points are in each decoder-layer class.

vLLM splits the residual stream into `hidden + residual` and fuses the addition into the
next norm. For a layer that returns such a pair, `post_block` is the returned pair,
`pre_attn` is the pair that the layer gets (before its input norm), and `post_attn` is
the pair that enters the norm before the MLP. Single-stream layers pass one tensor. The
other points are inputs and outputs of the layer's attention and MLP modules.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

MODELS = "vllm.model_executor.models"


@dataclass(frozen=True)
class LayerFamily:
    """The points of one decoder-layer class. All strings are attribute names.

    Attributes:
        hidden: the forward parameter that carries the stream.
        residual: the parameter with the stream's other summand; None for a
            single-stream layer, which may still return a tuple.
        mid_norm: the norm between attention and MLP; None where there is none.
        mid_norm_if: a flag of the layer. If it is false, the norm is at another place.
        mlp_reads_stream: the MLP reads the stream without a norm, so its input is the
            `post_attn` point.
        attention: the attention module; the first of these that the layer has.
        attention_beside: a module whose output is added to attention's before both are
            added to the stream, so the layer has no `attn_out`.
        projection: attention's output projection; the first that attention has.
        mlp: the MLP module; None where it is not a module of its own.
        mlp_unless: a flag or a module of the layer. If it is true or there, something
            beside the MLP writes with it, so the MLP is not the whole sublayer.
        attention_norm, mlp_norm: the norm that reads what the sublayer writes, before
            it is added to the stream.
        scale: the layer's factor for what a sublayer writes, or a flag that there is
            one. A layer whose factor is not 1 has no `attn_out` and no `mlp_out`.
        gate: a linear layer that reads the stream without a norm, if the layer has one.
        scales_float16: in float16 the layer keeps a multiple of the stream, so it has
            none of the points.
        reduces_late: under tensor parallelism, the layer adds up the sublayers' outputs
            before it reduces over ranks, so no rank ever has `attn_out` or `mlp_out`.
    """

    hidden: str = "hidden_states"
    residual: str | None = "residual"
    mid_norm: str | None = "post_attention_layernorm"
    mid_norm_if: str | None = None
    mlp_reads_stream: bool = False
    attention: tuple[str, ...] = ("self_attn",)
    attention_beside: str | None = None
    projection: tuple[str, ...] = ("o_proj",)
    mlp: str | None = "mlp"
    mlp_unless: str | None = None
    attention_norm: str | None = None
    mlp_norm: str | None = None
    scale: str | None = None
    gate: str | None = None
    scales_float16: bool = False
    reduces_late: bool = False


PAIR = LayerFamily()
GEMMA = LayerFamily(
    mid_norm="pre_feedforward_layernorm",
    attention_norm="post_attention_layernorm",
    mlp_norm="post_feedforward_layernorm",
)

# A layer with one norm and one mixer: attention, Mamba or an MLP.
MIXER = LayerFamily(mid_norm=None, attention=(), mlp=None)
GRANITE_HYBRID = LayerFamily(
    residual=None,
    mlp="shared_mlp",
    mlp_unless="block_sparse_moe",
    scale="residual_multiplier",
)
QWEN3_NEXT = LayerFamily(attention=("self_attn", "linear_attn"), scale="layer_scale")
# The layer itself holds the projections of its attention, so no module has the points.
JAMBA = LayerFamily(mid_norm="pre_ff_layernorm", attention=(), mlp="feed_forward")
LFM2 = LayerFamily(mid_norm="ffn_norm", projection=("out_proj",), mlp="feed_forward")
LFM2_CONV = replace(LFM2, attention=())

# To add a family: find the points in the layer's forward, add a line, and add the
# model to the conformance tests (tests/models/test_steering_sites.py).
FAMILIES: dict[str, LayerFamily] = {
    f"{MODELS}.gemma2.Gemma2DecoderLayer": GEMMA,
    f"{MODELS}.gemma3.Gemma3DecoderLayer": GEMMA,
    f"{MODELS}.gemma4.Gemma4DecoderLayer": LayerFamily(
        residual=None,
        mid_norm="pre_feedforward_layernorm",
        projection=(),  # its width differs between the layers
        mlp_unless="enable_moe_block",
        attention_norm="post_attention_layernorm",
        mlp_norm="post_feedforward_layernorm",
        gate="per_layer_input_gate",
    ),
    f"{MODELS}.llama.LlamaDecoderLayer": PAIR,  # also Phi-3
    f"{MODELS}.mistral.MistralDecoderLayer": PAIR,
    f"{MODELS}.qwen2.Qwen2DecoderLayer": PAIR,
    f"{MODELS}.qwen2_moe.Qwen2MoeDecoderLayer": PAIR,
    f"{MODELS}.qwen3.Qwen3DecoderLayer": PAIR,
    f"{MODELS}.qwen3_moe.Qwen3MoeDecoderLayer": PAIR,
    f"{MODELS}.qwen3_vl.Qwen3VLDecoderLayer": PAIR,
    f"{MODELS}.qwen3_vl_moe.Qwen3VLMoeDecoderLayer": PAIR,
    f"{MODELS}.gpt_oss.TransformerBlock": LayerFamily(attention=("attn",)),
    f"{MODELS}.gpt2.GPT2Block": LayerFamily(
        residual=None, mid_norm="ln_2", attention=("attn",), projection=("c_proj",)
    ),
    f"{MODELS}.gemma.GemmaDecoderLayer": PAIR,
    f"{MODELS}.mixtral.MixtralDecoderLayer": LayerFamily(mlp="block_sparse_moe"),
    f"{MODELS}.minimax_m2.MiniMaxM2DecoderLayer": LayerFamily(mlp="block_sparse_moe"),
    f"{MODELS}.olmoe.OlmoeDecoderLayer": PAIR,
    f"{MODELS}.granite.GraniteDecoderLayer": LayerFamily(
        residual=None, scale="residual_multiplier"
    ),
    f"{MODELS}.granitemoe.GraniteMoeDecoderLayer": LayerFamily(
        residual=None, mlp="block_sparse_moe", scale="residual_multiplier"
    ),
    f"{MODELS}.granitemoeshared.GraniteMoeSharedDecoderLayer": LayerFamily(
        residual=None,
        mlp="block_sparse_moe",
        mlp_unless="shared_mlp",
        scale="residual_multiplier",
    ),
    f"{MODELS}.opt.OPTDecoderLayer": LayerFamily(
        residual=None,
        mid_norm="final_layer_norm",
        mid_norm_if="do_layer_norm_before",
        projection=("out_proj",),
        mlp=None,
    ),
    f"{MODELS}.gpt_j.GPTJBlock": LayerFamily(
        residual=None, mid_norm=None, attention=("attn",), projection=("out_proj",)
    ),
    # Returns a pair whose second part the next layer does not read.
    f"{MODELS}.commandr.CohereDecoderLayer": LayerFamily(
        residual=None, mid_norm=None, reduces_late=True
    ),
    f"{MODELS}.cohere2_moe.Cohere2MoeDecoderLayer": LayerFamily(
        residual=None, mid_norm=None
    ),
    f"{MODELS}.exaone4.Exaone4DecoderLayer": LayerFamily(
        residual=None,
        mid_norm=None,
        mlp_reads_stream=True,
        attention_norm="post_attention_layernorm",
        mlp_norm="post_feedforward_layernorm",
    ),
    f"{MODELS}.glm4.Glm4DecoderLayer": LayerFamily(
        attention_norm="post_self_attn_layernorm", mlp_norm="post_mlp_layernorm"
    ),
    f"{MODELS}.glm4_moe.Glm4MoeDecoderLayer": PAIR,
    f"{MODELS}.glm4_moe_lite.Glm4MoeLiteDecoderLayer": PAIR,
    f"{MODELS}.ernie45_moe.Ernie4_5_MoeDecoderLayer": PAIR,
    f"{MODELS}.exaone_moe.ExaoneMoeDecoderLayer": PAIR,
    f"{MODELS}.afmoe.AfmoeDecoderLayer": LayerFamily(
        mid_norm="pre_mlp_layernorm",
        attention_norm="post_attention_layernorm",
        mlp_norm="post_mlp_layernorm",
    ),
    f"{MODELS}.hy_v3.HYV3DecoderLayer": PAIR,
    f"{MODELS}.nemotron.NemotronDecoderLayer": PAIR,
    f"{MODELS}.stablelm.StablelmDecoderLayer": LayerFamily(residual=None),
    f"{MODELS}.hyperclovax.HyperCLOVAXDecoderLayer": LayerFamily(
        residual=None,
        attention_norm="post_norm1",
        mlp_norm="post_norm2",
        scale="residual_multiplier",
    ),
    # A parallel block has no norm between attention and MLP.
    f"{MODELS}.falcon.FalconDecoderLayer": LayerFamily(
        residual=None,
        attention=("self_attention",),
        projection=("dense",),
        reduces_late=True,
    ),
    f"{MODELS}.apertus.ApertusDecoderLayer": LayerFamily(
        mid_norm="feedforward_layernorm"
    ),
    f"{MODELS}.qwen3_next.Qwen3NextDecoderLayer": QWEN3_NEXT,
    f"{MODELS}.qwen3_5.Qwen3_5DecoderLayer": QWEN3_NEXT,
    f"{MODELS}.deepseek_v2.DeepseekV2DecoderLayer": LayerFamily(scales_float16=True),
    f"{MODELS}.llama4.Llama4DecoderLayer": LayerFamily(mlp="feed_forward"),
    f"{MODELS}.granitemoehybrid.GraniteMoeHybridAttentionDecoderLayer": GRANITE_HYBRID,
    f"{MODELS}.granitemoehybrid.GraniteMoeHybridMambaDecoderLayer": replace(
        GRANITE_HYBRID, attention=()
    ),
    f"{MODELS}.nemotron_h.NemotronHAttentionDecoderLayer": replace(
        MIXER, attention=("mixer",)
    ),
    f"{MODELS}.nemotron_h.NemotronHMambaDecoderLayer": MIXER,
    f"{MODELS}.nemotron_h.NemotronHMLPDecoderLayer": replace(MIXER, mlp="mixer"),
    f"{MODELS}.nemotron_h.NemotronHMoEDecoderLayer": replace(MIXER, mlp="mixer"),
    f"{MODELS}.mamba.MambaDecoderLayer": MIXER,
    f"{MODELS}.mamba2.Mamba2DecoderLayer": MIXER,
    f"{MODELS}.jamba.JambaAttentionDecoderLayer": JAMBA,
    f"{MODELS}.jamba.JambaMambaDecoderLayer": JAMBA,
    f"{MODELS}.lfm2.Lfm2AttentionDecoderLayer": LFM2,
    f"{MODELS}.lfm2.Lfm2ShortConvDecoderLayer": LFM2_CONV,
    f"{MODELS}.lfm2_moe.Lfm2MoeAttentionDecoderLayer": LFM2,
    f"{MODELS}.lfm2_moe.Lfm2MoeShortConvDecoderLayer": LFM2_CONV,
    f"{MODELS}.falcon_h1.FalconH1ParallelHybrid": LayerFamily(
        residual=None,
        mid_norm="pre_ff_layernorm",
        attention_beside="mamba",
        mlp="feed_forward",
    ),
}

_UNVERIFIED = "edits of such layers are not verified, because"
_NO_REFERENCE = f"{_UNVERIFIED} Hugging Face Transformers has no such model"
_STREAMS = "a layer carries several residual streams, and a point is one tensor"
_SHARED = "the model's layers share one attention block"
_LOOPS = "the model runs a layer several times for one token"

# vLLM's decoder layers that cannot be steered, by the name of the class, and why. They
# are refused under `decoder_layer: "auto"` too.
UNFIT: dict[str, str] = {
    "DbrxBlock": "a layer's norms and attention are one module",
    "DeepseekV4DecoderLayer": _STREAMS,
    "Gemma3nDecoderLayer": _STREAMS,
    "Glm5NextDecoderLayer": _STREAMS,
    "HrmTextDecoderLayer": _LOOPS,
    "HYV4DecoderLayer": _STREAMS,
    "LoopCoderDecoderLayer": _LOOPS,
    "Plamo3DecoderLayer": _NO_REFERENCE,
    "Qwen4ExpDecoderLayer": _STREAMS,
    "Zamba2AttentionDecoderLayer": _SHARED,
    "Zamba2HybridLayer": _SHARED,
    "Zamba2MambaDecoderLayer": _SHARED,
}
