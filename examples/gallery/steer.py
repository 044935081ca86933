# SPDX-License-Identifier: Apache-2.0
"""Steer: one prompt plain, reconstructed, and with a feature held, in one batch."""

from __future__ import annotations

from demo_model import MODULE, demo_of_command_line, start


def main() -> None:
    """Print the four answers."""
    demo = demo_of_command_line(__doc__)
    llm = start(demo)
    from vllm.config.sae_steering_types import (
        SAEClampEntry,
        SAEClampSpec,
        SAEFullReconstructionSpec,
        SteeringSamplingParams,
    )

    # 1.25 times the largest activation seen on ordinary text.
    held = [SAEClampEntry(demo.feature, "absolute", 1.25 * demo.maximum)]
    pure = [SAEFullReconstructionSpec(MODULE, clamps={})]
    full = [SAEFullReconstructionSpec(MODULE, clamps=held)]
    common = {"max_tokens": 32, "temperature": 0.7, "seed": 1}
    requests = {
        "plain": SteeringSamplingParams(**common),
        "pure reconstruction": SteeringSamplingParams(
            **common, sae_full_reconstruction_specs=pure
        ),
        "delta": SteeringSamplingParams(
            **common, sae_clamp_specs=[SAEClampSpec(MODULE, clamps=held)]
        ),
        "full reconstruction": SteeringSamplingParams(
            **common, sae_full_reconstruction_specs=full
        ),
    }
    outputs = llm.generate(
        [demo.prompt] * len(requests), list(requests.values()), use_tqdm=False
    )
    for name, output in zip(requests, outputs, strict=True):
        print(f"{name}: {demo.prompt + output.outputs[0].text!r}")


if __name__ == "__main__":
    main()
