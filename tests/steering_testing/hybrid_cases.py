# SPDX-License-Identifier: Apache-2.0
"""The conformance cases of models whose layers differ."""

from __future__ import annotations

from typing import Any

from steering_testing.case import SUBLAYER, Case

from vllm.model_executor.layers.steering_family_table import MODELS

GRANITE = f"{MODELS}.granitemoehybrid.GraniteMoeHybrid"
NEMOTRON = f"{MODELS}.nemotron_h.NemotronH"
NO_ATTENTION = ("attn_z", "attn_out")
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
    **{
        name: Case(
            title,
            name,
            f"{MODELS}.{name}.Lfm2{kind}AttentionDecoderLayer",
            others=(f"{MODELS}.{name}.Lfm2{kind}ShortConvDecoderLayer",),
            lacks_at=((0, NO_ATTENTION), (2, NO_ATTENTION)),
            recurrent=True,
        )
        for title, name, kind in (("LFM2", "lfm2", ""), ("LFM2 MoE", "lfm2_moe", "Moe"))
    },
}
BFLOAT16: dict[str, Any] = {
    "options": (("dtype", "bfloat16"),),
    "tolerance": 5e-2,
    "recurrent": True,
}
# In tests/gpu/test_families_gpu.py.
GPU_HYBRID_CASES = {
    "mamba": Case(
        "Mamba",
        "mamba",
        f"{MODELS}.mamba.MambaDecoderLayer",
        lacks=("post_attn", *SUBLAYER),
        **BFLOAT16,
    ),
    "falcon_mamba": Case(
        "Falcon-Mamba",
        "falcon_mamba",
        f"{MODELS}.mamba.MambaDecoderLayer",
        lacks=("post_attn", *SUBLAYER),
        **BFLOAT16,
    ),
    "jamba": Case(
        "Jamba",
        "jamba",
        f"{MODELS}.jamba.JambaAttentionDecoderLayer",
        lacks=NO_ATTENTION,
        others=(f"{MODELS}.jamba.JambaMambaDecoderLayer",),
        **BFLOAT16,
    ),
    "nemotron3": Case(
        "Nemotron-3 (MoE)",
        "nemotron3",
        f"{NEMOTRON}AttentionDecoderLayer",
        lacks=("post_attn",),
        others=(f"{NEMOTRON}MambaDecoderLayer", f"{NEMOTRON}MoEDecoderLayer"),
        lacks_at=((0, SUBLAYER), (1, NO_ATTENTION), (2, ("mlp_in", "mlp_out"))),
        **BFLOAT16,
    ),
}
