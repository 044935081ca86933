# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/features/steering_tiers.md: what each tier does to the text.

    python examples/golden_gate/tiers.py [--seeds 4]

Each row is the share of bridge words and the fluency of sampled answers, in an
in-process engine. The vector is made as in CAA: the mean stream on bridge text, minus
the mean on other text.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

import corpus
from demo_engine import (
    MODULE,
    PROMPTS,
    SPECS,
    TEMPERATURE,
    TOKENS,
    load_features,
    quiet_stderr,
    set_environment,
    start_engine,
)

if TYPE_CHECKING:
    import torch

    from vllm import LLM

VECTOR = "bridge-vector"
BRIDGE_PROMPT = "The famous golden gate bridge"
TEXT_SEED = 424242
Request = dict[str, Any]


def bridge_vector() -> tuple[torch.Tensor, float]:
    """The vector `[D]` of the bridge, and the mean norm of the stream there."""
    import torch
    import train
    from demo_engine import MODEL
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    x, topics = train.collect(model, tokenizer, TEXT_SEED, num_batches=8)
    names = [topic.name for topic in corpus.TOPICS]
    bridge = topics == names.index("bridge")
    others = (topics >= 0) & ~bridge
    return x[bridge].mean(0) - x[others].mean(0), float(x.norm(dim=-1).mean())


def about_other_things(features: dict[str, Any]) -> dict[str, Request]:
    """The requests of the first table, by the name of their row."""
    bridge = features["topics"]["bridge"]
    strengths = {
        f"`absolute` {s:g} × maximum": clamp(
            bridge["feature"], "absolute", s * bridge["max_activation"]
        )
        for s in (1.25, 2)
    }
    found: dict[str, Request] = {"plain": {}}
    for scale in (0.5, 1, 1.5, 2):
        spec = {"module_name": VECTOR, "scale": scale}
        found[f"vector, scale {scale:g}"] = {"steering_vector_specs": [spec]}
    for name, entry in strengths.items():
        found[f"delta, {name}"] = delta(entry)
    found["full, no clamps"] = {SPECS: [{"module_name": MODULE}]}
    for name, entry in strengths.items():
        found[f"full, {name}"] = {SPECS: [{"module_name": MODULE, "clamps": [entry]}]}
    return found


def about_the_bridge(features: dict[str, Any]) -> dict[str, Request]:
    """The requests of the second table, which act only where the feature is active."""
    feature = features["topics"]["bridge"]["feature"]
    return {
        "plain": {},
        "delta, `scale` 0 (ablation)": delta(clamp(feature, "scale", 0.0)),
        "delta, `scale` 3": delta(clamp(feature, "scale", 3.0)),
    }


def clamp(feature: int, kind: str, value: float) -> Request:
    """A clamp entry."""
    return {"feature_idx": feature, "kind": kind, "value": value}


def delta(entry: Request) -> Request:
    """A request that clamps one feature in the delta tier."""
    return {"sae_clamp_specs": [{"module_name": MODULE, "clamps": [entry]}]}


def measure(
    llm: LLM, prompts: list[str], requests: dict[str, Request], seeds: int, tokens: int
) -> dict[str, tuple[float, float]]:
    """Share of bridge words and fluency of each request, over prompts and seeds."""
    from vllm.config.sae_steering_types import SteeringSamplingParams

    jobs = [(prompt, seed) for prompt in prompts for seed in range(seeds)]
    found = {}
    for name, request in requests.items():
        params = [
            SteeringSamplingParams(
                temperature=TEMPERATURE,
                seed=seed,
                max_tokens=tokens,
                min_tokens=tokens,
                **request,
            )
            for _, seed in jobs
        ]
        outputs = llm.generate([prompt for prompt, _ in jobs], params, use_tqdm=False)
        texts = [output.outputs[0].text for output in outputs]
        found[name] = corpus.bridge_share(texts), corpus.fluency(texts)
    return found


def print_table(found: dict[str, tuple[float, float]]) -> None:
    """The rows in Markdown."""
    print("| request | bridge words | fluency |\n|---|---|---|")
    for name, (share, fluent) in found.items():
        print(f"| {name} | {share:.0%} | {fluent:.0%} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=4, help="answers to each prompt")
    seeds = parser.parse_args().seeds
    set_environment()
    from vllm.entrypoints.steering import register_vector

    features = load_features()
    with quiet_stderr():
        vector, norm = bridge_vector()
        llm = start_engine(steering=True, compiled=False)
        register_vector(llm, VECTOR, {"post_block.1": vector})
        others = about_other_things(features)
        scale_3 = {"delta, `scale` 3": about_the_bridge(features)["delta, `scale` 3"]}
        first = measure(llm, list(PROMPTS), others | scale_3, seeds, TOKENS)
        bridge = about_the_bridge(features)
        second = measure(llm, [BRIDGE_PROMPT], bridge, seeds, TOKENS)
    print(f"The vector's norm is {vector.norm():.1f}, the stream's {norm:.1f}.")
    print(f"\n{len(PROMPTS)} prompts about other things, {seeds} seeds:\n")
    print_table(first)
    print(f"\n{BRIDGE_PROMPT!r}, {seeds} seeds:\n")
    print_table(second)


if __name__ == "__main__":
    main()
