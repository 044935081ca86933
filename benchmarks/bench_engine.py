# SPDX-License-Identifier: Apache-2.0
"""What steering costs a whole engine: decode and prefill, beside stock vLLM.

A model of Gemma-2-2B's shape with dummy weights in bfloat16, and JumpReLU SAEs
(16384 x 2304) whose thresholds are set on the model's own residual stream so that
about 100 features fire per token. Every engine runs in a process of its own:

    python benchmarks/bench_engine.py --out benchmarks/results/<gpu>.json

Decode: the engine is stepped until every request decodes, then windows of steps are
timed and the median window is reported. `ratio` is against stock in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BATCHES = (1, 64, 256)
LAYERS, HIDDEN, FEATURES, L0 = 26, 2304, 16384, 100
SITE_LAYERS = {"one": (20,), "four": (5, 10, 15, 20)}
PROMPT, WINDOW, WINDOWS = 32, 40, 15
PREFILL = (8, 1024)

CONFIG = {
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


def random_prompt(rng: random.Random, length: int) -> dict[str, list[int]]:
    ids = [rng.randrange(3, CONFIG["vocab_size"]) for _ in range(length)]
    return {"prompt_token_ids": ids}


def make_engine(root: Path, modules: dict[str, str] | None, **options: Any) -> Any:
    from vllm import LLM

    config = {"steering": {"modules": modules}} if modules else {}
    return LLM(
        str(root / "model"),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=2048,
        max_num_seqs=256,
        max_num_batched_tokens=8192,
        gpu_memory_utilization=0.7,
        enable_prefix_caching=False,
        additional_config=config,
        **options,
    )


def sampling(max_tokens: int, specs: list[Any] | None) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        temperature=1.0,
        max_tokens=max_tokens,
        ignore_eos=True,
        detokenize=False,
        extra_args={"sae_full_reconstruction_specs": specs} if specs else None,
    )


def decode_rate(llm: Any, batch: int, specs: list[Any] | None) -> dict[str, float]:
    """Tokens per second of a batch that only decodes, median of the windows."""
    import torch

    rng = random.Random(batch)
    engine = llm.llm_engine
    budget = PROMPT + (WINDOWS + 1) * WINDOW + 64
    for at in range(batch):
        params = sampling(budget, specs)
        engine.add_request(f"{batch}-{at}", random_prompt(rng, PROMPT), params)
    for _ in range(WINDOW):
        engine.step()
    rates = []
    for _ in range(WINDOWS):
        torch.cuda.synchronize()
        start, tokens = time.perf_counter(), 0
        for _ in range(WINDOW):
            tokens += len(engine.step())
        torch.cuda.synchronize()
        rates.append(tokens / (time.perf_counter() - start))
    engine.abort_request([f"{batch}-{at}" for at in range(batch)])
    while engine.has_unfinished_requests():
        engine.step()
    return {"tokens_per_s": statistics.median(rates), "windows": sorted(rates)}


def prefill_rate(llm: Any, specs: list[Any] | None) -> dict[str, float]:
    """Prompt tokens per second of eight prompts of 1024 tokens, one token out."""
    rng = random.Random(7)
    count, length = PREFILL
    times = []
    for _ in range(7):
        prompts = [random_prompt(rng, length) for _ in range(count)]
        start = time.perf_counter()
        llm.generate(prompts, sampling(1, specs), use_tqdm=False)
        times.append(time.perf_counter() - start)
    median = statistics.median(times[2:])
    return {"tokens_per_s": count * length / median, "spread": 0.0}


def measure(llm: Any, label: str, specs: list[Any] | None) -> list[dict[str, Any]]:
    found = []
    for batch in BATCHES:
        rate = decode_rate(llm, batch, specs)
        found.append({"mode": label, "phase": "decode", "batch": batch, **rate})
        print(found[-1], flush=True)
    rate = prefill_rate(llm, specs)
    found.append({"mode": label, "phase": "prefill", "batch": PREFILL[0], **rate})
    print(found[-1], flush=True)
    return found


# ---- one process each -----------------------------------------------------------


def run_calibrate(root: Path) -> list[dict[str, Any]]:
    """Sample the stream while the eager model decodes; write the SAE modules."""
    import torch

    from vllm.model_executor.model_loader.sae_formats.native import save_native

    llm = make_engine(root, None, enforce_eager=True)
    core = llm.llm_engine.engine_core.engine_core
    worker = core.model_executor.driver_worker.worker
    layers = worker.model_runner.get_model().model.layers
    streams: dict[int, list[Any]] = {layer: [] for layer in SITE_LAYERS["four"]}

    def keep(layer: int) -> Any:
        def hook(module: Any, args: Any, out: Any) -> None:
            if out[0].shape[0] <= 64:
                streams[layer].append((out[0] + out[1]).float().cpu())

        return hook

    for layer in streams:
        layers[layer].register_forward_hook(keep(layer))
    rng = random.Random(0)
    prompts = [random_prompt(rng, PROMPT) for _ in range(64)]
    llm.generate(prompts, sampling(40, None), use_tqdm=False)
    rows = []
    sites = {}
    for layer, parts in streams.items():
        x = torch.cat(parts)[-2048:].cuda()
        generator = torch.Generator(device="cuda").manual_seed(layer)
        shape = (FEATURES, HIDDEN)
        W = torch.randn(shape, generator=generator, device="cuda") / HIDDEN**0.5
        pre = (x - x.mean(0)) @ W.T
        threshold = pre.quantile(1 - L0 / FEATURES, dim=0).clamp(min=1e-4)
        bias = -(W @ x.mean(0))
        fired = ((x @ W.T + bias) > threshold).sum(1).float().mean().item()
        rows.append({"mode": "calibration", "layer": layer, "l0": fired})
        sites[layer, "post_block"] = {
            "W_enc": W.bfloat16(),
            "b_enc": bias,
            "threshold": threshold,
            "W_dec": W.bfloat16(),
            "b_dec": x.mean(0),
            "activation": "jumprelu",
        }
    for name, chosen in SITE_LAYERS.items():
        save_native(
            root / name, {(at, "post_block"): sites[at, "post_block"] for at in chosen}
        )
    return rows


def run_stock(root: Path) -> list[dict[str, Any]]:
    return measure(make_engine(root, None), "stock", None)


def run_eager(root: Path) -> list[dict[str, Any]]:
    llm = make_engine(root, None, enforce_eager=True)
    rate = decode_rate(llm, 64, None)
    return [{"mode": "stock eager", "phase": "decode", "batch": 64, **rate}]


def run_one(root: Path) -> list[dict[str, Any]]:
    llm = make_engine(root, {"sae": str(root / "one")})
    spec = [{"module_name": "sae", "clamps": [clamp()]}]
    return measure(llm, "idle", None) + measure(llm, "one site", spec)


def run_four(root: Path) -> list[dict[str, Any]]:
    llm = make_engine(root, {"sae": str(root / "four")})
    return measure(llm, "four sites", [{"module_name": "sae", "clamps": {}}])


def clamp() -> dict[str, Any]:
    return {"feature_idx": 11, "kind": "absolute", "value": 1.0}


def run_hf(root: Path) -> list[dict[str, Any]]:
    """Hugging Face generate with a forward hook that does what a notebook does."""
    import torch
    import transformers
    from safetensors.torch import load_file

    values = {k: v for k, v in CONFIG.items() if k not in ("architectures",)}
    config = transformers.Gemma2Config(**values)
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16
        ).eval()
    sae = load_file(root / "one" / "20.post_block.safetensors", device="cuda")
    W_enc, W_dec = sae["W_enc"].float(), sae["W_dec"].float()

    def hook(module: Any, args: Any, out: Any) -> Any:
        x = (out[0] if isinstance(out, tuple) else out).float()
        pre = x @ W_enc.T + sae["b_enc"]
        acts = pre * (pre > sae["threshold"])
        acts[..., 11] = 1.0
        new = (acts @ W_dec + sae["b_dec"]).to(torch.bfloat16)
        return (new, *out[1:]) if isinstance(out, tuple) else new

    model.model.layers[20].register_forward_hook(hook)
    ids = torch.randint(3, CONFIG["vocab_size"], (64, PROMPT), device="cuda")
    times = []
    for new_tokens in (4, 36, 36):
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.no_grad():
            model.generate(
                ids,
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=True,
            )
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    rate = 64 * 36 / min(times[1:])
    row = {"mode": "hugging face + hook", "phase": "decode", "batch": 64}
    return [{**row, "tokens_per_s": rate, "spread": 0.0}]


STAGES = {
    "calibrate": run_calibrate,
    "stock": run_stock,
    "one": run_one,
    "four": run_four,
    "eager": run_eager,
    "hf": run_hf,
}


def add_ratios(rows: list[dict[str, Any]]) -> None:
    base = {
        (row["phase"], row["batch"]): row["tokens_per_s"]
        for row in rows
        if row["mode"] == "stock"
    }
    for row in rows:
        stock = base.get((row.get("phase"), row.get("batch")))
        if stock:
            row["ratio"] = round(row["tokens_per_s"] / stock, 4)


def environment() -> dict[str, str]:
    import torch
    import triton

    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": os.environ.get("STEERING_COMMIT", "unknown"),
    }


def main() -> None:
    """Run the stages, each in a process of its own, and merge into the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("--run", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        rows = STAGES[args.run](args.root)
        (args.root / f"{args.run}.json").write_text(json.dumps(rows))
        return
    root = args.root or Path(tempfile.mkdtemp(prefix="bench-engine-"))
    (root / "model").mkdir(parents=True, exist_ok=True)
    (root / "model" / "config.json").write_text(json.dumps(CONFIG))
    env = dict(os.environ, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    rows = []
    for stage in args.stages:
        command = [sys.executable, __file__, "--run", stage, "--root", str(root)]
        start = time.perf_counter()
        code = subprocess.call(command, env=env)
        print(f"stage {stage}: exit {code}, {time.perf_counter() - start:.0f} s")
        if code == 0:
            rows += json.loads((root / f"{stage}.json").read_text())
            add_ratios(rows)
            write(args.out, rows)
    for row in rows:
        print(row)


def write(out: Path | None, rows: list[dict[str, Any]]) -> None:
    """Merge what there is into the results file, after every stage."""
    if out is None:
        return
    found = json.loads(out.read_text()) if out.exists() else {}
    found |= {"engine": rows, "engine_environment": environment()}
    out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
