# SPDX-License-Identifier: Apache-2.0
"""Sweep: how strong should a clamp be? On-topic words and repetitions by strength."""

from __future__ import annotations

from demo_model import MODULE, demo_of_command_line, start, topic_share

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
SAMPLES = 4


def main() -> None:
    """Print a line for each strength, in multiples of the feature's maximum."""
    demo = demo_of_command_line(__doc__)
    llm = start(demo)
    from vllm.config.sae_steering_types import (
        SAEClampEntry,
        SAEFullReconstructionSpec,
        SteeringSamplingParams,
    )

    def params(strength: float) -> SteeringSamplingParams:
        held = [SAEClampEntry(demo.feature, "absolute", strength * demo.maximum)]
        spec = SAEFullReconstructionSpec(MODULE, clamps=held)
        return SteeringSamplingParams(
            n=SAMPLES,
            max_tokens=32,
            temperature=0.7,
            seed=1,
            sae_full_reconstruction_specs=[spec],
        )

    outputs = llm.generate(
        [demo.prompt] * len(STRENGTHS), [params(s) for s in STRENGTHS], use_tqdm=False
    )
    print(f"{'strength':>8}{'on topic':>10}{'not repeated':>14}")
    for strength, output in zip(STRENGTHS, outputs, strict=True):
        text = " ".join(sample.text for sample in output.outputs)
        words = text.split()
        fresh = len(set(words)) / max(1, len(words))
        print(f"{strength:>8g}{topic_share(text, demo):>10.0%}{fresh:>14.0%}")


if __name__ == "__main__":
    main()
