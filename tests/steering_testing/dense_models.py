# SPDX-License-Identifier: Apache-2.0
"""More tiny dense models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from steering_testing.sizes import (
    BOS,
    COMMON,
    EOS,
    HEAD,
    HIDDEN,
    LAYERS,
    PAD,
    VOCAB,
    config,
)

FALCON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "tie_word_embeddings": False,
}

DENSE_MODELS: dict[str, Callable[[], Any]] = {
    # Falcon-7B, Falcon-40B, and a sequential block with biases as in Falcon-RW.
    "falcon": config("FalconConfig", **FALCON, multi_query=True),
    "falcon_new": config(
        "FalconConfig", **FALCON, num_kv_heads=1, new_decoder_architecture=True
    ),
    "falcon_sequential": config(
        "FalconConfig", **FALCON, multi_query=False, parallel_attn=False, bias=True
    ),
    "hyperclovax": config("HyperCLOVAXConfig", **COMMON, **HEAD),
}
