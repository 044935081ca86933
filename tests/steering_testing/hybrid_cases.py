# SPDX-License-Identifier: Apache-2.0
"""The conformance cases of models whose layers differ."""

from __future__ import annotations

from steering_testing.case import SUBLAYER, Case

from vllm.model_executor.layers.steering_family_table import MODELS

GRANITE = f"{MODELS}.granitemoehybrid.GraniteMoeHybrid"
NEMOTRON = f"{MODELS}.nemotron_h.NemotronH"
HYBRID_CASES = {
    "granitemoehybrid": Case(
        "Granite 4 (hybrid MoE)",
        "granitemoehybrid",
        f"{GRANITE}AttentionDecoderLayer",
        lacks=("attn_out", "mlp_in", "mlp_out"),
        others=(f"{GRANITE}MambaDecoderLayer",),
        lacks_at=((0, ("attn_z",)), (2, ("attn_z",))),
        recurrent=True,
    ),
    "granite_hybrid": Case(
        "Granite 4 (hybrid, dense)",
        "granite_hybrid",
        f"{GRANITE}AttentionDecoderLayer",
        lacks=("attn_out", "mlp_out"),
        others=(f"{GRANITE}MambaDecoderLayer",),
        lacks_at=((0, ("attn_z",)), (2, ("attn_z",))),
        recurrent=True,
    ),
    "nemotron_h": Case(
        "Nemotron-H (dense)",
        "nemotron_h",
        f"{NEMOTRON}AttentionDecoderLayer",
        lacks=("post_attn",),
        others=(f"{NEMOTRON}MambaDecoderLayer", f"{NEMOTRON}MLPDecoderLayer"),
        lacks_at=(
            (0, SUBLAYER),
            (1, ("mlp_in", "mlp_out")),
            (2, ("attn_z", "attn_out")),
        ),
        recurrent=True,
    ),
    "mamba2": Case(
        "Mamba-2",
        "mamba2",
        f"{MODELS}.mamba2.Mamba2DecoderLayer",
        lacks=("post_attn", *SUBLAYER),
        recurrent=True,
    ),
    "falcon_h1": Case(
        "Falcon-H1",
        "falcon_h1",
        f"{MODELS}.falcon_h1.FalconH1ParallelHybrid",
        lacks=("attn_out",),
        recurrent=True,
    ),
}
