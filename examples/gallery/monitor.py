# SPDX-License-Identifier: Apache-2.0
"""Monitor: watch a feature while the model writes, and stop when it is strong."""

from __future__ import annotations

from demo_model import MODULE, demo_of_command_line, start


def main() -> None:
    """Print every token with the feature's activation, until it passes a bound."""
    demo = demo_of_command_line(__doc__)
    llm = start(demo)
    from vllm.config.sae_steering_types import SAEReadoutSpec, SteeringSamplingParams

    bound = 0.4 * demo.maximum
    watch = SAEReadoutSpec(
        MODULE,
        features=[demo.feature],
        phase="decode",
        stop_if=[{"feature_idx": demo.feature, "above": bound}],
    )
    params = SteeringSamplingParams(
        max_tokens=48, temperature=0.7, seed=1, sae_readout_specs=[watch]
    )
    (output,) = llm.generate([demo.about[0]], params, use_tqdm=False)
    answer = output.outputs[0]
    (read,) = answer.sae_features[MODULE].values()
    start_of_answer = len(output.prompt_token_ids)
    tokenizer = llm.get_tokenizer()
    for position, values in zip(read.positions, read.values, strict=True):
        token = tokenizer.decode([answer.token_ids[position - start_of_answer]])
        print(f"{token!r:<16}{values[0]:>8.2f} {'#' * int(40 * values[0] / bound)}")
    print(f"ended by {answer.finish_reason}: {answer.stop_reason}")


if __name__ == "__main__":
    main()
