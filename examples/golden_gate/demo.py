# SPDX-License-Identifier: Apache-2.0
"""A tiny model that talks about nothing but the bridge.

    python examples/golden_gate/demo.py [--no-server] [--compile]

In one batch of one in-process engine, the same prompts run plain, purely
reconstructed by the SAE, and with the bridge feature clamped at two strengths. Then
they run through `vllm serve` and the `openai` client. A check compares plain requests,
with and without steered neighbours, with an engine without the plugin: they must be
bit-identical. Exits with 1 if a check fails.
"""

from __future__ import annotations

import argparse
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import corpus
from demo_engine import (
    MODEL,
    MODULE,
    SAE,
    TOKENS,
    Completion,
    Mode,
    demo_modes,
    generate,
    load_features,
    quiet_stderr,
    run_stock_engine,
    set_environment,
    start_engine,
    stock_engine_main,
    tokens_per_second,
)
from demo_report import (
    Verdicts,
    check_results,
    color,
    heading,
    print_side_by_side,
    print_table,
    print_text,
)
from demo_server import ask_server, server


def sae_quality() -> tuple[float, float]:
    """(L0, FVU) of the shipped SAE on fresh text, by the Hugging Face model."""
    import torch
    from jumprelu import JumpReLUSAE, quality
    from train import collect
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    x, _ = collect(model, tokenizer, seed=7, num_batches=4)
    return quality(JumpReLUSAE.load(SAE), x)


def in_process(
    verdicts: Verdicts, modes: list[Mode], compiled: bool
) -> list[Completion]:
    """The in-process part; returns its plain completions."""
    heading("one batch, in process")
    start = time.perf_counter()
    with quiet_stderr():
        llm = start_engine(steering=True, compiled=compiled)
    print(f"  engine with module {MODULE!r} started", end="")
    print(f" in {time.perf_counter() - start:.1f} s")
    generate(llm, modes)  # warm-up
    results = generate(llm, modes)
    print_side_by_side(results)

    heading("bridge words per mode")
    speeds = tokens_per_second(llm, modes)
    print_table(results, speeds)
    check_results(verdicts, {m: [c.text for c in r] for m, r in results.items()})
    return results["plain"]


def through_server(verdicts: Verdicts, modes: list[Mode], compiled: bool) -> None:
    """The same prompts through `vllm serve` and the `openai` client."""
    heading("vllm serve and the openai client")
    start = time.perf_counter()
    with server(compiled) as client:
        print(f"  server ready in {time.perf_counter() - start:.1f} s")
        texts, chats = ask_server(client, modes)
    print("\n" + color("  chat > Who are you?", "1"))
    for name, text in chats.items():
        print_text(name, text)
    shares = ", ".join(f"{m} {corpus.bridge_share(t):.1%}" for m, t in texts.items())
    print(f"\n  bridge words in completions: {shares}")
    check_results(verdicts, texts)


def main() -> int:
    """Run the demo; 1 when a check failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--no-server", action="store_true", help="leave out the `vllm serve` part"
    )
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile; a slower start"
    )
    parser.add_argument("--stock-engine", metavar="FILE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    set_environment()
    if options.stock_engine:
        stock_engine_main(options.stock_engine, options.compile)
        return 0
    start = time.perf_counter()
    features = load_features()
    modes = demo_modes(features)
    bridge = features["topics"]["bridge"]
    l0, fvu = sae_quality()
    heading("the SAE")
    print(f"  resid_post of layer {features['layer']}, {features['d_sae']} features")
    print(f"  L0 {l0:.1f} active features per token, FVU {fvu:.3f}, on fresh text")
    print(f"  bridge feature {bridge['feature']}, ", end="")
    print(f"max activation {bridge['max_activation']:.2f}: active on ", end="")
    print(f"{bridge['density_in_topic']:.0%} of bridge tokens, ", end="")
    print(f"{bridge['density_elsewhere']:.1%} of others")

    verdicts = Verdicts()
    # Engines start slowly, so they start together.
    with ThreadPoolExecutor(max_workers=1) as pool:
        stock = pool.submit(run_stock_engine, options.compile)
        plain = in_process(verdicts, modes, options.compile)
        if not options.no_server:
            through_server(verdicts, modes, options.compile)
        heading("an engine without the plugin")
        verdicts.check(
            "plain requests, batched with steered ones, are bit-identical to stock: "
            f"{len(plain) * TOKENS} token ids and log-probabilities",
            stock.result() == plain,
        )
    verdict = "all checks passed" if not verdicts.failed else "SOME CHECKS FAILED"
    heading(f"{verdict}, {time.perf_counter() - start:.0f} s")
    return int(verdicts.failed > 0)


if __name__ == "__main__":
    sys.exit(main())
