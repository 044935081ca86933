# SPDX-License-Identifier: Apache-2.0
"""Seam into `vllm.outputs`: the fields for what a request has read.

The edits a branch would make: properties `CompletionOutput.sae_features` and
`RequestOutput.prompt_sae_features`, both `ReadFeatures | None` and made when they are
asked for, and `RequestOutput.add` merges them as it merges tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.config.sae_features import ReadFeatures, merge
from vllm.plugins.steering.seam import BOUND, Stock, resolve, wrap
from vllm.v1.engine.steering_read_outputs import PendingFeatures

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput

MODULE = "vllm.outputs"


class FeaturesField:
    """A field of an output: None, or features that are made when they are asked for."""

    def __init__(self, name: str):
        self.name = name

    def __get__(self, output: object, owner: type) -> ReadFeatures | None:
        if output is None:  # asked of the class
            return None
        value = vars(output).get(self.name)
        if isinstance(value, PendingFeatures):
            value = vars(output)[self.name] = value.make()
        return value

    def __set__(
        self, output: object, value: ReadFeatures | PendingFeatures | None
    ) -> None:
        vars(output)[self.name] = value


def install() -> None:
    """Add the fields, None unless a request reads."""
    target = f"{MODULE}:RequestOutput.add"
    if target in BOUND:
        return
    _, _, completion = resolve(f"{MODULE}:CompletionOutput")
    _, _, request = resolve(f"{MODULE}:RequestOutput")
    completion.sae_features = FeaturesField("sae_features")
    request.prompt_sae_features = FeaturesField("prompt_sae_features")
    wrap(target, ("self", "next_output", "aggregate"), _make_add)


def _make_add(stock: Stock) -> Stock:
    def add(self: RequestOutput, next_output: RequestOutput, aggregate: bool) -> None:
        if aggregate:
            before = {output.index: output.sae_features for output in self.outputs}
            prompt = self.prompt_sae_features
            stock(self, next_output, aggregate)
            self.prompt_sae_features = merge(prompt, next_output.prompt_sae_features)
            for output in next_output.outputs:
                if output.sae_features is None:
                    continue
                for own in self.outputs:
                    if own.index == output.index and own.index in before:
                        own.sae_features = merge(before[own.index], output.sae_features)
        else:
            stock(self, next_output, aggregate)
            if next_output.prompt_sae_features is not None:
                self.prompt_sae_features = next_output.prompt_sae_features

    return add
