# SPDX-License-Identifier: Apache-2.0
"""What an SAE costs a tensor-parallel engine: replicated and shared by the ranks.

    python benchmarks/bench_tp.py --tp 2 --layers 24 --shape 27b
    python benchmarks/bench_tp.py --dry-run        # a tiny model, on a CPU
    python benchmarks/bench_tp.py --root DIR --modes shard --wait FILE

With `--root`, the model and the SAE stay in DIR and are used again. With `--wait`, an
engine starts and then waits until the file exists, so that several start at a time and
measure in turn.

A model of the shape with dummy weights and `--layers` layers; one SAE in its middle.
Engines start one after another: without steering, shared, replicated. A step's time is
the difference between a long and a short generation, the best of `--rounds`. With
fewer layers than the model has, the shares of stock are of a shorter step, and a step
of few tokens may wait for the host, which hides what a site costs: time decoding with
all layers and one engine at a time. 100 features fire on every token, always the same.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from facts import environment

FULL_KEY = "sae_full_reconstruction_specs"
CLAMP = {"feature_idx": 11, "kind": "absolute", "value": 1.0}
L0 = 100
MODES = ("stock", "shard", "replicate")
PROMPT = 32

# hidden, intermediate, heads, key-value heads, head width, layers, features
SHAPES: dict[str, tuple[int, ...]] = {
    "27b": (5376, 21504, 32, 16, 128, 62, 131072),
    "70b": (8192, 28672, 64, 8, 128, 80, 65536),
    "2b": (2304, 9216, 8, 4, 256, 26, 16384),
    "tiny": (64, 128, 2, 2, 32, 3, 256),
}


def write_model(path: Path, shape: str, layers: int) -> None:
    """The configuration of a Llama of this shape."""
    hidden, intermediate, heads, kv_heads, head_dim, _, _ = SHAPES[shape]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "max_position_embeddings": 8192,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "torch_dtype": "bfloat16",
        "vocab_size": 32000 if shape != "tiny" else 128,
    }
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))


def write_sae(path: Path, shape: str, layer: int) -> None:
    """An SAE of which L0 features, spread over all ranks, always fire."""
    import torch

    from vllm.model_executor.model_loader.sae_formats.native import save_native

    hidden, features = SHAPES[shape][0], SHAPES[shape][-1]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    W_enc, W_dec = (
        (torch.randn(features, hidden, device=device, dtype=torch.bfloat16) * scale)
        for scale in (1e-6, 0.01)
    )
    fires = torch.full((features,), -1.0)
    fires[torch.linspace(0, features - 1, min(L0, features)).long()] = 1.0
    site = {
        "W_enc": W_enc.cpu(),
        "W_dec": W_dec.cpu(),
        "b_enc": fires,
        "b_dec": torch.zeros(hidden),
        "threshold": torch.zeros(features),
    }
    save_native(path, {(layer, "resid_post"): site})


def generate(llm: Any, batch: int, length: int, tokens: int, steered: bool) -> float:
    """Seconds of one generation of a batch."""
    from vllm import SamplingParams

    rng = random.Random(batch)
    prompts = [
        {"prompt_token_ids": [1, *(rng.randrange(3, 100) for _ in range(length - 1))]}
        for _ in range(batch)
    ]
    spec = {"module_name": "sae", "clamps": [CLAMP]}
    params = SamplingParams(
        temperature=0,
        max_tokens=tokens,
        ignore_eos=True,
        detokenize=False,
        extra_args={FULL_KEY: [spec]} if steered else None,
    )
    start = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - start


def step_ms(llm: Any, batch: int, steered: bool, rounds: int, steps: int) -> float:
    """Milliseconds of a decoding step, the best of several rounds."""
    generate(llm, batch, PROMPT, 4, steered)
    found = []
    for _ in range(rounds):
        short = generate(llm, batch, PROMPT, 4, steered)
        long = generate(llm, batch, PROMPT, 4 + steps, steered)
        found.append(1e3 * (long - short) / steps)
    return min(found)


def prefill_ms(llm: Any, length: int, steered: bool, rounds: int) -> float:
    """Milliseconds of a step with eight prompts."""
    generate(llm, 8, length, 1, steered)
    return 1e3 * min(generate(llm, 8, length, 1, steered) for _ in range(rounds))


def measure(args: argparse.Namespace, root: Path, mode: str) -> dict[str, Any]:
    """All times of one engine: `stock`, `replicate` or `shard`."""
    from vllm import LLM

    config: dict[str, Any] = {}
    if mode != "stock":
        module = {"path": str(root / "sae"), "sharding": mode}
        config = {"steering": {"modules": {"sae": module}, "readout": False}}
    options: dict[str, Any] = {
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": "float32" if args.dry_run else "bfloat16",
        "max_model_len": 128 if args.dry_run else 2048,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 8192,
        "kv_cache_memory_bytes": (1 << 26) if args.dry_run else (4 << 30),
        "gpu_memory_utilization": 0.3,
        "enable_prefix_caching": False,
        "tensor_parallel_size": args.tp,
        "distributed_executor_backend": "mp",
        "compilation_config": {"cudagraph_capture_sizes": [1, 64]},
        "enforce_eager": args.dry_run,
    }
    start = time.perf_counter()
    llm = LLM(str(root / "model"), additional_config=config, **options)
    row: dict[str, Any] = {"mode": mode, "start_s": round(time.perf_counter() - start)}
    print(f"{mode}: started in {row['start_s']} s", flush=True)
    while args.wait is not None and not args.wait.exists():
        time.sleep(0.2)
    length = 64 if args.dry_run else 1024
    for steered in (False, True) if mode != "stock" else (False,):
        name = "steered" if steered else "idle"
        for batch in (1, 64):
            ms = step_ms(llm, batch, steered, args.rounds, args.steps)
            row[f"{name}_{batch}_ms"] = round(ms, 4)
        row[f"{name}_prefill_ms"] = round(
            prefill_ms(llm, length, steered, args.rounds), 3
        )
        print(json.dumps(row), flush=True)
    llm.llm_engine.engine_core.shutdown()
    return row


def shares(rows: list[dict[str, Any]]) -> None:
    """Print each mode beside stock: the share, and microseconds more."""
    stock = rows[0]
    for row in rows[1:] if stock["mode"] == "stock" else ():
        for state in ("idle", "steered"):
            for kind in ("1", "64", "prefill"):
                ms = row[f"{state}_{kind}_ms"]
                base = stock[f"idle_{kind}_ms"]
                print(
                    f"{row['mode']:>9} {state:>7} {kind:>7}: {ms:9.3f} ms, "
                    f"{100 * base / ms:6.2f} % of stock, {1e3 * (ms - base):+8.1f} us"
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--shape", choices=SHAPES, default="27b")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--root", type=Path, default=None)
    parser.add_argument("--wait", type=Path, default=None)
    parser.add_argument("--modes", nargs="*", default=list(MODES), choices=MODES)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    if args.dry_run:
        args.shape, args.layers, args.rounds, args.steps = "tiny", 3, 1, 4
    facts = {} if args.dry_run else environment()
    with tempfile.TemporaryDirectory() as directory:
        root = args.root or Path(directory)
        if not (root / "sae").exists():
            root.mkdir(exist_ok=True)
            write_model(root / "model", args.shape, args.layers)
            write_sae(root / "sae", args.shape, args.layers // 2)
        rows: list[dict[str, Any]] = []
        for mode in args.modes:
            rows.append(measure(args, root, mode))
            shares([rows[0], *rows[-1:]] if rows[1:] else rows)
    result = {
        **facts,
        "tp": args.tp,
        "shape": args.shape,
        "layers": args.layers,
        "rows": rows,
    }
    print(json.dumps(result))
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
