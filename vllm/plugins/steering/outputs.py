# SPDX-License-Identifier: Apache-2.0
"""Seam into `vllm.outputs`: the fields for what a request has read.

The edits a branch would make: properties `CompletionOutput.sae_features` and
`RequestOutput.prompt_sae_features`, both `ReadFeatures | None` and made when they are
asked for, and `RequestOutput.add` merges them as it merges tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.config.sae_features import FEATURES, PROMPT_FEATURES, ReadFeatures, merge
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

    def append(self, output: object, later: object) -> None:
        """Put what a later output of the same request has read after an output's own.

        Nothing is made: if a client reads its stream slowly, outputs are joined token
        by token in the loop that serves all clients.
        """
        own, then = vars(output).get(self.name), vars(later).get(self.name)
        if isinstance(own, PendingFeatures) and isinstance(then, PendingFeatures):
            vars(output)[self.name] = own.and_then(then)
            return
        made = self.__get__(output, type(output)), self.__get__(later, type(later))
        self.__set__(output, merge(*made))


ANSWER = FeaturesField(FEATURES)
PROMPT = FeaturesField(PROMPT_FEATURES)


def install() -> None:
    """Add the fields, None unless a request reads."""
    target = f"{MODULE}:RequestOutput.add"
    if target in BOUND:
        return
    _, _, completion = resolve(f"{MODULE}:CompletionOutput")
    _, _, request = resolve(f"{MODULE}:RequestOutput")
    completion.sae_features = ANSWER
    request.prompt_sae_features = PROMPT
    wrap(target, ("self", "next_output", "aggregate"), _make_add)


def _make_add(stock: Stock) -> Stock:
    def add(self: RequestOutput, next_output: RequestOutput, aggregate: bool) -> None:
        if aggregate:
            before = {output.index: output for output in self.outputs}
            stock(self, next_output, aggregate)
            PROMPT.append(self, next_output)
            for output in next_output.outputs:
                if output.index in before:
                    ANSWER.append(before[output.index], output)
        else:
            stock(self, next_output, aggregate)
            if next_output.prompt_sae_features is not None:
                self.prompt_sae_features = next_output.prompt_sae_features

    return add
