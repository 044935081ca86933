# SPDX-License-Identifier: Apache-2.0
"""The doctor's tiny run: a random Llama with a random SAE, in this process.

Prints one line. Exits with 0 when the steered request differs from the plain one and
leaves it unchanged.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

D, F, VOCAB = 128, 64, 256
PROMPT = list(range(5, 25))


def make_model(folder: Path) -> None:
    """Save a random Llama."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=D,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def make_sae(folder: Path) -> None:
    """Save a random SAE of the first layer's output."""
    import torch

    from vllm.model_executor.model_loader.sae_formats.native import save_native

    generator = torch.Generator().manual_seed(0)
    W_dec = torch.nn.functional.normalize(torch.randn(F, D, generator=generator), dim=1)
    site = {
        "W_enc": W_dec.clone(),
        "b_enc": torch.zeros(F),
        "W_dec": W_dec,
        "b_dec": torch.zeros(D),
        "threshold": torch.full((F,), 0.1),
    }
    save_native(folder, {(0, "post_block"): site})


def main() -> int:
    """Run; 0 when all is as it should be."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from vllm import LLM, SamplingParams

    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        model, sae = Path(scratch) / "model", Path(scratch) / "sae"
        make_model(model)
        make_sae(sae)
        llm = LLM(
            str(model),
            skip_tokenizer_init=True,
            enforce_eager=True,
            max_model_len=128,
            max_num_seqs=4,
            kv_cache_memory_bytes=1 << 26,
            additional_config={"steering": {"modules": {"sae": str(sae)}}},
        )
    clamp = {"feature_idx": 3, "kind": "absolute", "value": 1000.0}
    spec = {"module_name": "sae", "clamps": [clamp]}
    plain, steered = (
        SamplingParams(
            temperature=0,
            max_tokens=8,
            ignore_eos=True,
            detokenize=False,
            extra_args=args,
        )
        for args in (None, {"sae_full_reconstruction_specs": [spec]})
    )
    prompt = {"prompt_token_ids": PROMPT}
    alone = llm.generate([prompt], [plain], use_tqdm=False)
    both = llm.generate([prompt, prompt], [plain, steered], use_tqdm=False)
    first, beside, edited = (list(o.outputs[0].token_ids) for o in (*alone, *both))
    if beside != first:
        print("a plain request changed beside a steered one")
        return 1
    if edited == first:
        print("a clamp of 1000 changed nothing")
        return 1
    seconds = time.perf_counter() - start
    print(f"a clamp changes its own request and no other ({seconds:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
