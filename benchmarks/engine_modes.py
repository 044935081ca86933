# SPDX-License-Identifier: Apache-2.0
"""The engines that are compared: model, modules, modes, and what requests ask for."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the parent of the stages reads this file and needs no torch
    from engine_timing import Engine, Mode

LAYERS, HIDDEN = 26, 2304
FEATURES, L0 = 16384, 100
PROMPT = 32
PREFILL_COUNT, PREFILL_LENGTH = 8, 1024

# The shape of Gemma-2-2B.
CONFIG: dict[str, Any] = {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": HIDDEN,
    "intermediate_size": 9216,
    "max_position_embeddings": 8192,
    "num_attention_heads": 8,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "torch_dtype": "bfloat16",
    "vocab_size": 256000,
}

# The same for every engine. A fixed KV cache skips the profiling of graph memory,
# which would drop the graphs of the engines that are already there.
ENGINE_OPTIONS: dict[str, Any] = {
    "load_format": "dummy",
    "skip_tokenizer_init": True,
    "dtype": "bfloat16",
    "max_model_len": 2048,
    "max_num_seqs": 256,
    "max_num_batched_tokens": 8192,
    "gpu_memory_utilization": 0.1,
    "kv_cache_memory_bytes": 6 << 30,
    "enable_prefix_caching": False,
}
# The batches that are measured, and little else: capture takes seconds a size.
GRAPHS: dict[str, Any] = {
    "compilation_config": {"cudagraph_capture_sizes": [1, 8, 64, 256]}
}

# SAE module -> the layers of its sites.
SITE_LAYERS: dict[str, tuple[int, ...]] = {"one": (20,), "four": (5, 10, 15, 20)}
# Engines that have one of these modules -> which. `twins` is the engine `one` with
# CUDA graphs without steering for its idle steps.
MODULE_OF = {**{name: name for name in SITE_LAYERS}, "twins": "one"}
FULL_KEY = "sae_full_reconstruction_specs"
CLAMP = {"feature_idx": 11, "kind": "absolute", "value": 1.0}

# Engine -> mode -> clamps of its requests; None asks for no steering.
MODES: dict[str, dict[str, Any]] = {
    "stock": {"stock": None},
    "one": {"idle": None, "one site": [CLAMP]},
    "four": {"four sites": {}},
    "again": {"stock again": None},
    "twins": {"idle with twins": None},
    "eager": {"stock eager": None},
}


def model_runner(llm: Any) -> Any:
    """The model runner of an engine in this process."""
    core = llm.llm_engine.engine_core.engine_core
    return core.model_executor.driver_worker.worker.model_runner


def start(root: Path, name: str) -> Engine:
    """Start the engine of this name (a key of MODES) in this process."""
    from engine_timing import Engine, StepProbe

    from vllm import LLM
    from vllm.config.steering_environment import IDLE_GRAPHS_ENV

    os.environ[IDLE_GRAPHS_ENV] = "1" if name == "twins" else "0"
    config: dict[str, Any] = {}
    if name in MODULE_OF:
        config = {"steering": {"modules": {"sae": str(root / MODULE_OF[name])}}}
    options = {"enforce_eager": True} if name == "eager" else GRAPHS
    llm = LLM(
        str(root / "model"), additional_config=config, **ENGINE_OPTIONS, **options
    )
    runner = model_runner(llm)
    spread_embeddings(runner.get_model())
    return Engine(llm, StepProbe(runner))


def dictionary(device: Any, width: int) -> Any:
    """The directions that streams and SAEs are made of, `[FEATURES, width]`, bf16.

    One random orthonormal basis after another.
    """
    import torch

    generator = torch.Generator(device).manual_seed(3)
    bases = []
    for _ in range(-(-FEATURES // width)):
        square = torch.randn(width, width, generator=generator, device=device)
        bases.append(torch.linalg.qr(square)[0])
    return torch.cat(bases)[:FEATURES].bfloat16()


def spread_embeddings(model: Any) -> None:
    """Embed every token as the sum of L0 random directions of one basis.

    With dummy weights, all tokens of a prompt have almost the same stream. These
    embeddings outweigh what the layers add. So at every site each token is a sparse
    sum of different directions, which the SAEs find and reconstruct.
    """
    import torch

    weight = model.model.embed_tokens.weight.data
    device, width = weight.device, weight.shape[1]
    directions = dictionary(device, width).float()
    generator = torch.Generator(device).manual_seed(4)
    scale = 100 / width**0.5  # Gemma multiplies embeddings by the root of the width
    for rows in weight.split(1 << 15):
        shape = (len(rows), L0)
        chosen = torch.randint(width, shape, generator=generator, device=device)
        bases = (len(rows), 1)
        chosen += width * torch.randint(
            FEATURES // width, bases, generator=generator, device=device
        )
        summed = torch.nn.functional.embedding_bag(chosen, directions, mode="sum")
        rows.copy_(scale * summed)


def modes_of(name: str, engine: Engine) -> list[Mode]:
    """The modes that this engine serves."""
    from engine_timing import Mode

    found = []
    for mode, clamps in MODES[name].items():
        specs = None if clamps is None else [{"module_name": "sae", "clamps": clamps}]
        found.append(Mode(mode, engine, specs))
    return found


def random_prompts(seed: int, count: int, length: int) -> list[dict[str, list[int]]]:
    """Prompts of random tokens, none of them special."""
    rng = random.Random(seed)
    vocab = range(3, CONFIG["vocab_size"])
    return [{"prompt_token_ids": rng.choices(vocab, k=length)} for _ in range(count)]


def _extra_args(specs: Any) -> dict[str, Any] | None:
    if not specs:
        return None
    return specs if isinstance(specs, dict) else {FULL_KEY: specs}


def sampling(
    max_tokens: int, specs: list[dict[str, Any]] | dict[str, Any] | None = None
) -> Any:
    """As `LLM.generate` asks: nothing is reported before a request ends.

    Args:
        specs: of full reconstruction, or `extra_args` with all that is asked.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=1.0,
        max_tokens=max_tokens,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args=_extra_args(specs),
    )
