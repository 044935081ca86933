# SPDX-License-Identifier: Apache-2.0
"""Evaluate: what does the SAE cost? Cross-entropy plain and purely reconstructed."""

from __future__ import annotations

from typing import Any

from demo_model import MODULE, demo_of_command_line, start


def main() -> None:
    """Print the mean next-token cross-entropy of texts, and how sparse the SAE is."""
    demo = demo_of_command_line(__doc__)
    llm = start(demo)
    from vllm.config.sae_steering_types import (
        SAEFullReconstructionSpec,
        SAEReadoutSpec,
        SteeringSamplingParams,
    )

    texts = [*demo.about, *demo.other]

    def run(**fields: Any) -> list[Any]:
        params = SteeringSamplingParams(max_tokens=1, prompt_logprobs=0, **fields)
        return llm.generate(texts, params, use_tqdm=False)

    def cross_entropy(outputs: list[Any]) -> float:
        """Nats for each token after the first of its text."""
        losses = [
            -next(iter(entry.values())).logprob
            for output in outputs
            for entry in output.prompt_logprobs
            if entry
        ]
        return sum(losses) / len(losses)

    pure = SAEFullReconstructionSpec(MODULE, clamps={})
    plain = run(sae_readout_specs=[SAEReadoutSpec(MODULE, top_k=1, phase="prefill")])
    recon = run(sae_full_reconstruction_specs=[pure])
    active = [
        count
        for output in plain
        for count in next(iter(output.prompt_sae_features[MODULE].values())).num_active
    ]
    print(f"cross-entropy plain          {cross_entropy(plain):.3f}")
    print(f"cross-entropy reconstructed  {cross_entropy(recon):.3f}")
    print(f"L0, active features a token  {sum(active) / len(active):.1f}")


if __name__ == "__main__":
    main()
