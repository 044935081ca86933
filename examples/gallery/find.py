# SPDX-License-Identifier: Apache-2.0
"""Find: which features are active on some texts and not on others?"""

from __future__ import annotations

import numpy as np
from demo_model import MODULE, demo_of_command_line, start


def main() -> None:
    """Rank features by their mean activation on one set of texts less the other."""
    demo = demo_of_command_line(__doc__)
    llm = start(demo)
    from vllm.config.sae_steering_types import SAEReadoutSpec, SteeringSamplingParams

    read = SteeringSamplingParams(
        max_tokens=1,
        sae_readout_specs=[SAEReadoutSpec(MODULE, top_k=64, phase="prefill")],
    )

    def mean_activations(texts: tuple[str, ...]) -> np.ndarray:
        """`[texts, F]`, over the tokens of each text."""
        rows = []
        for output in llm.generate(list(texts), read, use_tqdm=False):
            (site,) = output.prompt_sae_features[MODULE].values()
            rows.append(site.to_dense().mean(0))
        return np.stack(rows)

    about, other = mean_activations(demo.about), mean_activations(demo.other)
    score = about.min(0) - other.mean(0)  # active on every text of the first set
    print(f"{'feature':>8}{'about':>9}{'other':>9}")
    for feature in np.argsort(-score)[:8]:
        on, off = about[:, feature].mean(), other[:, feature].mean()
        print(f"{feature:>8}{on:>9.2f}{off:>9.2f}")


if __name__ == "__main__":
    main()
