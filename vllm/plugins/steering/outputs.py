# SPDX-License-Identifier: Apache-2.0
"""Seam into `vllm.outputs`: the fields for what a request has read.

The edits a branch would make: `CompletionOutput.sae_features` and
`RequestOutput.prompt_sae_features`, both `ReadFeatures | None`, and `RequestOutput.add`
merges them as it merges tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.config.sae_features import merge
from vllm.plugins.steering.seam import BOUND, Stock, resolve, wrap

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput

MODULE = "vllm.outputs"


def install() -> None:
    """Add the fields, None unless a request reads."""
    target = f"{MODULE}:RequestOutput.add"
    if target in BOUND:
        return
    _, _, completion = resolve(f"{MODULE}:CompletionOutput")
    _, _, request = resolve(f"{MODULE}:RequestOutput")
    completion.sae_features = None
    request.prompt_sae_features = None
    wrap(target, ("self", "next_output", "aggregate"), _make_add)


def _make_add(stock: Stock) -> Stock:
    def add(self: RequestOutput, next_output: RequestOutput, aggregate: bool) -> None:
        before = {output.index: output.sae_features for output in self.outputs}
        prompt = self.prompt_sae_features
        stock(self, next_output, aggregate)
        if aggregate:
            self.prompt_sae_features = merge(prompt, next_output.prompt_sae_features)
            for output in next_output.outputs:
                if output.sae_features is None:
                    continue
                for own in self.outputs:
                    if own.index == output.index and own.index in before:
                        own.sae_features = merge(before[own.index], output.sae_features)
        elif next_output.prompt_sae_features is not None:
            self.prompt_sae_features = next_output.prompt_sae_features

    return add
