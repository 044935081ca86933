# SPDX-License-Identifier: Apache-2.0
"""What a worker counts for each module: tokens steered, bypassed and saturated."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch

from vllm.config.sae_inline_vectors import INLINE_PREFIX
from vllm.config.steering import Tier
from vllm.config.steering_json import Json
from vllm.model_executor.layers.steering_bypass import Bypass
from vllm.model_executor.layers.steering_state import StepState
from vllm.v1.worker.steering_index import Rows, Runs, StepIndex
from vllm.v1.worker.steering_inline import InlineVectors
from vllm.v1.worker.steering_manager import Edits
from vllm.v1.worker.steering_places import Place, SAEPlace

# The name under which the vectors of requests are counted.
INLINE = "(inline)"
PHASES = ("prefill", "decode")
# The counts of so many modules that are gone are kept.
MAX_REMOVED = 64
# [tier, phase] of each module.
Steered = dict[str, np.ndarray]


def counted_as(module: str) -> str:
    """The name under which a module, or a vector of a request, is counted."""
    return INLINE if module.startswith(INLINE_PREFIX) else module


class TokenCounts:
    """Tokens that each module was asked to edit, by tier and phase; on the host.

    A step like the one before costs one addition. When the batch changes, what the
    steps before had is added to a counter of each row; when a few requests get other
    rows, only their counters follow. A row's counter goes to the modules that it edits
    when the row is freed, or when somebody asks.

    Args:
        num_rows: rows of each tier.
    """

    def __init__(self, num_rows: int):
        self.num_rows = num_rows
        self._of_row: np.ndarray = np.zeros(
            (len(Tier), num_rows, len(PHASES)), dtype=np.int64
        )
        self._modules: dict[tuple[Tier, int], frozenset[str]] = {}
        self._total: Steered = {}
        self._runs: Runs | None = None
        self._steps = 0

    def hold(self, tier: Tier, rows: Mapping[int, Edits]) -> None:
        """These rows of a tier hold these edits from now on."""
        for row, edits in rows.items():
            names = frozenset(counted_as(edit.module) for edit in edits)
            self._modules[tier, row] = names

    def follow(self, index: StepIndex) -> None:
        """Count the tokens of a step."""
        if index.runs is not self._runs:
            self._settle()
            self._runs = index.runs
        elif self._steps:
            for move in index.moves:
                self._correct(*move)
        self._steps += 1

    def _correct(self, had: Rows, before: int, rows: Rows, phase: int) -> None:
        """A token of each step so far had these rows; `_settle` will count the new."""
        for tier, (old, new) in enumerate(zip(had, rows, strict=True)):
            if (old, before) != (new, phase):
                self._of_row[tier, old, before] += self._steps
                self._of_row[tier, new, phase] -= self._steps

    def free(self, tier: Tier, row: int) -> None:
        """A row is free: credit the modules that it has edited."""
        names = self._modules.pop((tier, row), None)
        if names is None:
            return
        self._settle()
        _credit(self._total, names, tier, self._of_row[tier, row])
        self._of_row[tier, row] = 0

    def forget(self, module: str) -> None:
        """Drop the counts of a module that is gone."""
        self._total.pop(module, None)

    def steered(self) -> Steered:
        """int64 `[tier, phase]` of each module, since the worker started."""
        self._settle()
        found = {name: counts.copy() for name, counts in self._total.items()}
        for (tier, row), names in self._modules.items():
            _credit(found, names, tier, self._of_row[tier, row])
        return found

    def _settle(self) -> None:
        """Add what the steps since the last change had to the counters of rows."""
        steps, self._steps = self._steps, 0
        if not steps or self._runs is None:
            return
        rows, in_prompt, lengths = self._runs
        phase: np.ndarray = (~in_prompt).astype(np.int64)
        tiers = np.arange(len(rows))[:, None]
        np.add.at(self._of_row, (tiers, rows, phase), lengths * steps)


def _credit(
    counts: Steered, names: Iterable[str], tier: Tier, tokens: np.ndarray
) -> None:
    for name in names:
        if name not in counts:
            counts[name] = np.zeros((len(Tier), len(PHASES)), dtype=np.int64)
        counts[name][tier] += tokens


class DeviceCounts:
    """Tokens that each module has saturated or bypassed; counted on the device.

    A slot's counters go to its module when the module leaves the slot.

    Args:
        step: of the worker; its `bypass` follows the modules.
        inline: the vectors of requests.
    """

    def __init__(self, step: StepState, inline: InlineVectors):
        self.step = step
        self.inline = inline
        self._places: dict[str, Sequence[Place]] = {}
        self._masks: dict[str, int] = {}
        self._saturated: Counter[str] = Counter()
        self._bypassed: Counter[str] = Counter()

    def bind(self, module: str, places: Sequence[Place], mask: int) -> None:
        """The module is in these slots; `mask` is the bit of its skip set, or 0."""
        self._places[module], self._masks[module] = places, mask
        self._watch()

    def unbind(self, module: str) -> None:
        """The module leaves its slots."""
        counters = [place.saturated for place in self._places.pop(module, ())]
        self._saturated[module] += sum(_read(counters))
        for counter in counters:
            counter.zero_()
        self._masks.pop(module, None)
        self._watch()

    def forget(self, module: str) -> None:
        """Drop the counts of a module that is gone."""
        self._saturated.pop(module, None)
        self._bypassed.pop(module, None)

    def saturated(self) -> Counter[str]:
        """Tokens since the worker started. This waits for the step in flight."""
        pairs = [
            (module, place.saturated)
            for module, places in self._places.items()
            for place in places
        ]
        pairs += [
            (INLINE, stack.slot.saturated[stack.directions.start :])
            for stack in self.inline.stacks.values()
        ]
        found = self._saturated.copy()
        numbers = iter(_read([counter for _, counter in pairs]))
        for module, counter in pairs:
            found[module] += sum(itertools.islice(numbers, len(counter)))
        return found

    def bypassed(self) -> Counter[str]:
        """Tokens since the worker started. This waits for the step in flight."""
        found, bypass = self._bypassed.copy(), self.step.bypass
        for module, tokens in zip(bypass.modules, bypass.counts.tolist(), strict=False):
            found[module.name] += tokens
        return found

    def _watch(self) -> None:
        """Let the device count for the modules that are bound now."""
        self._bypassed = self.bypassed()
        watched = []
        for module, mask in self._masks.items():
            places = self._places[module]
            slots = [place.slot for place in places if isinstance(place, SAEPlace)]
            tables = [(slot.delta, slot.full) for slot in slots]
            if mask and tables:
                watched.append(Bypass(module, mask, tables))
        self.step.bypass.watch(watched)


def _read(counters: Sequence[torch.Tensor]) -> list[int]:
    """The numbers of all counters, in one copy from the device."""
    return torch.cat(list(counters)).tolist() if counters else []


def tokens_of_modules(
    modules: Iterable[str],
    steered: Steered,
    bypassed: Mapping[str, int],
    saturated: Mapping[str, int],
) -> Json:
    """What `ModuleChanges.stats` says of these modules and all that were counted."""
    names = sorted({*modules, *steered, *bypassed, *saturated})
    nothing: np.ndarray = np.zeros((len(Tier), len(PHASES)), dtype=np.int64)
    return {
        name: {
            "steered": {
                tier.name.lower(): dict(zip(PHASES, row, strict=True))
                for tier, row in zip(
                    Tier, steered.get(name, nothing).tolist(), strict=True
                )
            },
            "bypassed": bypassed.get(name, 0),
            "saturated": saturated.get(name, 0),
        }
        for name in names
    }
