# SPDX-License-Identifier: Apache-2.0
"""Models and SAEs of the sizes that a tensor-parallel group serves, as files.

The weights of a model are dummies, so all tokens of a prompt would have almost the same
stream. `directions` are what the streams and the SAEs are made of instead: random
orthonormal bases, one after another. A token's embedding is `AMPLITUDE` times the sum
of `l0` directions of one basis, which outweighs what the layers add. The SAEs' encoder
and decoder are the directions. So at every site each token has about `l0` non-zeros,
other tokens have others, and the reconstruction is close to the stream.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

AMPLITUDE = 1000.0
THRESHOLD = 0.7  # of the amplitude
HOOK = "resid_post"


@dataclass(frozen=True)
class Shape:
    """A model, and the SAE that its sites get.

    Attributes:
        family: which architecture (`FAMILIES`).
        site: the layer of the single site.
        sites: the layers of four sites; none if they are not measured.
        l0: features that fire on a token.
    """

    family: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    vocab: int
    features: int
    site: int
    sites: tuple[int, ...] = ()
    l0: int = 100


# The sizes of Gemma-3-27B, Llama-3.3-70B and Gemma-2-2B.
SHAPES: dict[str, Shape] = {
    "27b": Shape(
        "gemma3", 5376, 21504, 32, 16, 128, 62, 262208, 131072, 31, (12, 24, 40, 53)
    ),
    "70b": Shape("llama", 8192, 28672, 64, 8, 128, 80, 128256, 65536, 50),
    "2b": Shape("gemma2", 2304, 9216, 8, 4, 256, 26, 256000, 16384, 13),
    "tiny": Shape("gemma3", 64, 128, 4, 2, 32, 6, 256, 512, 3, (1, 2, 4, 5), 4),
}

FAMILIES: dict[str, dict[str, Any]] = {
    "gemma2": {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "bos_token_id": 2,
        "eos_token_id": 1,
    },
    "gemma3": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 168,
        "sliding_window": 1024,
        "bos_token_id": 2,
        "eos_token_id": 1,
    },
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}


def model_config(shape: Shape) -> dict[str, Any]:
    """`config.json` of a model of this shape."""
    return {
        **FAMILIES[shape.family],
        "pad_token_id": 0,
        "head_dim": shape.head_dim,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": 8192,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": 1e-6,
        "torch_dtype": "bfloat16",
        "vocab_size": shape.vocab,
    }


def directions(shape: Shape, device: str) -> torch.Tensor:
    """`[features, hidden]` in bfloat16: orthonormal bases, one after another."""
    import torch

    generator = torch.Generator(device).manual_seed(3)
    width = shape.hidden
    bases = []
    for _ in range(-(-shape.features // width)):
        square = torch.randn(width, width, generator=generator, device=device)
        bases.append(torch.linalg.qr(square)[0].bfloat16())
    return torch.cat(bases)[: shape.features]


def write_files(root: Path, shape: Shape) -> None:
    """`model`, and the modules `one` and `four`, whose sites share one file."""
    import torch

    from vllm.model_executor.model_loader.sae_formats.native import (
        MANIFEST,
        save_native,
    )

    (root / "model").mkdir(parents=True, exist_ok=True)
    (root / "model" / "config.json").write_text(json.dumps(model_config(shape)))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    every = directions(shape, device).cpu()
    site = {
        "W_enc": every,
        "W_dec": every,
        "b_enc": torch.zeros(shape.features),
        "b_dec": torch.zeros(shape.hidden),
        "threshold": torch.full((shape.features,), THRESHOLD * AMPLITUDE),
    }
    save_native(root / "one", {(shape.site, HOOK): site})
    manifest = json.loads((root / "one" / MANIFEST).read_text())
    (entry,) = manifest["sites"]
    (root / "four").mkdir(exist_ok=True)
    (root / "four" / entry["file"]).hardlink_to(root / "one" / entry["file"])
    manifest["sites"] = [entry | {"layer": layer} for layer in shape.sites]
    (root / "four" / MANIFEST).write_text(json.dumps(manifest))


def embedding_scale(shape: Shape) -> float:
    """What the model multiplies embeddings by: Gemma, by the root of the width."""
    return shape.hidden**0.5 if shape.family.startswith("gemma") else 1.0


def firing(embedded: torch.Tensor, every: torch.Tensor, shape: Shape) -> float:
    """How many features fire on each of these embeddings, on average."""
    stream = (embedded.float() * embedding_scale(shape)).bfloat16()
    scores = stream @ every.T
    return float((scores > THRESHOLD * AMPLITUDE).sum(1).float().mean())


def spread_embeddings(
    weight: torch.Tensor, every: torch.Tensor, shape: Shape, seed: int
) -> None:
    """Fill a part of the embeddings, `[rows, hidden]`, in place."""
    import torch

    device, width = weight.device, shape.hidden
    scale = AMPLITUDE / embedding_scale(shape)
    generator = torch.Generator(device).manual_seed(seed)
    bases = max(1, shape.features // width)
    for rows in weight.split(1 << 13):
        first = width * torch.randint(
            bases, (len(rows),), generator=generator, device=device
        )
        # Directions of one basis, at equal distances from a random one.
        at = torch.randint(width, (len(rows),), generator=generator, device=device)
        total = torch.zeros(len(rows), width, device=device)
        for i in range(shape.l0):
            total += every[first + (at + i * (width // shape.l0)) % width].float()
        rows.copy_(scale * total)
