# SPDX-License-Identifier: Apache-2.0
"""The vector specs of a request while they are checked.

A vector belongs to a registered module, or the request brings it itself. From here on
both are treated alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from vllm.config.sae_inline_vectors import (
    as_module,
    read_vector,
    refuse_no_direction,
    reserved_site,
    too_many,
)
from vllm.config.sae_steering_request import Group
from vllm.config.sae_steering_sites import named_hook, named_module
from vllm.config.sae_steering_spans import (
    TOKEN_PHASES,
    Coverage,
    acts,
    may_overlap,
)
from vllm.config.sae_steering_specs import SteeringVectorSpec
from vllm.config.sae_steering_vector_action import (
    VectorAction,
    add_scales,
    round_to_fp32,
)
from vllm.config.steering import ModuleInfo, SteeringConfig
from vllm.config.steering_checks import bad, refusal, shown
from vllm.config.steering_points import HOOK_NAMES, HookPoint, parse_site


@dataclass(frozen=True)
class InlineVector:
    """A vector that a request brings, and the module that stands for it."""

    module: ModuleInfo
    data: bytes


@dataclass(frozen=True)
class _Vector:
    """What one spec does along a vector, and where."""

    path: str
    coverage: Coverage
    action: VectorAction


@dataclass
class VectorDraft:
    """What a request does along vectors, by the names of their modules."""

    config: SteeringConfig
    vectors: dict[str, list[_Vector]] = field(default_factory=dict)
    brought: dict[str, InlineVector] = field(default_factory=dict)

    @property
    def inline(self) -> dict[str, InlineVector]:
        """The request's own vectors, in the order of their names."""
        return dict(sorted(self.brought.items()))

    def add(
        self, path: str, spec: SteeringVectorSpec, coverage: Coverage
    ) -> tuple[ModuleInfo, bool]:
        """Check one spec. Scales of one vector add up; other kinds cannot be combined.

        Returns:
            The vector's module, and whether no spec before this one named it.
        """
        module = self.module_of(path, spec)
        name = module.name
        asked = _Vector(path, coverage, _action(path, spec))
        if name in self.brought and not asked.action.sums:
            refuse_no_direction(f"{path}.vector", self.brought[name].data)
        others = self.vectors.setdefault(name, [])
        for other in others:
            together = other.action.sums and asked.action.sums
            if not together and may_overlap(asked.coverage, other.coverage):
                own = name in self.brought
                vector = "this vector" if own else f"module {shown(name)}"
                raise refusal(
                    f"{path}.kind",
                    f"{vector} already acts on some of these tokens ({other.path}), "
                    'expected no other spec there, or only kind "add" without relative',
                )
        others.append(asked)
        _check_sums(others)
        return module, len(others) == 1

    def module_of(self, path: str, spec: SteeringVectorSpec) -> ModuleInfo:
        """The module that a spec names, or the one that stands for its own vector."""
        where = f"{path}.module_name"
        if spec.vector is not None:
            if spec.module_name is not None:
                raise refusal(where, "found module_name and vector, expected only one")
            return self.bring(path, spec, spec.vector)
        places = (("layer", spec.layer), ("hook", spec.hook), ("site", spec.site))
        for key, given in places:
            if given is not None:
                raise refusal(
                    f"{path}.{key}", f"found {shown(given)}, expected only with vector"
                )
        if spec.module_name is None:
            raise refusal(where, "is missing, expected a string, or vector and site")
        return named_module(where, spec.module_name, self.config, "vectors")

    def bring(self, path: str, spec: SteeringVectorSpec, text: str) -> ModuleInfo:
        """Check a vector that the request brings. Equal vectors count once."""
        field, layer, hook = _place(path, spec)
        site = reserved_site(f"{path}.{field}", hook, layer, self.config)
        data = read_vector(f"{path}.vector", text, site.width)
        made = InlineVector(as_module(site, data), data)
        name = made.module.name
        if name not in self.brought:
            here = sum(
                own.module.site(hook, layer) is not None
                for own in self.brought.values()
            )
            if here >= site.per_request:
                raise too_many(f"{path}.vector", site, here + 1)
            self.brought[name] = made
        return self.brought[name].module

    def summed(self) -> dict[Group, VectorAction]:
        """The action of every vector and coverage."""
        found: dict[Group, VectorAction] = {}
        for name, vectors in self.vectors.items():
            for coverage in dict.fromkeys(vector.coverage for vector in vectors):
                same = [v.action for v in vectors if v.coverage == coverage]
                action = same[0]
                if action.sums:
                    action = VectorAction("add", add_scales([a.value for a in same]))
                found[name, coverage] = action
        return found


def _place(path: str, spec: SteeringVectorSpec) -> tuple[str, int, HookPoint]:
    """Where a request's own vector acts, and which of the spec's fields says so."""
    if spec.site is not None:
        for key, given in (("layer", spec.layer), ("hook", spec.hook)):
            if given is not None:
                raise refusal(
                    f"{path}.{key}",
                    f"found {shown(given)} beside site, expected only one of them",
                )
        place = parse_site(spec.site)
        if place is None:
            raise bad(
                f"{path}.site",
                spec.site,
                f"HOOK.LAYER such as post_block.20, with one of {HOOK_NAMES}",
            )
        return "site", *place
    if spec.layer is None:
        reason = "is missing, expected one with vector and hook, or site"
        raise refusal(f"{path}.layer", reason)
    if spec.hook is None:
        reason = "is missing, expected one with vector and layer, or site"
        raise refusal(f"{path}.hook", reason)
    return "layer", spec.layer, named_hook(f"{path}.hook", spec.hook)


def _check_sums(vectors: Sequence[_Vector]) -> None:
    """Refuse scales of one vector whose sum overflows float32."""
    adding = [vector for vector in vectors if vector.action.sums]
    if all(isinstance(vector.coverage, str) for vector in adding):
        subsets = [
            [v.action.value for v in adding if acts(v.coverage, phase)]
            for phase in TOKEN_PHASES
        ]
    else:
        # On some token, any subset of them may act.
        subsets = [[abs(vector.action.value) for vector in adding]]
    for scales in subsets:
        try:
            add_scales(scales)
        except OverflowError:
            raise refusal(
                f"{vectors[-1].path}.scale",
                "the scales of this module add up to more than float32 holds, "
                "expected a finite sum",
            ) from None


def _action(path: str, spec: SteeringVectorSpec) -> VectorAction:
    """What a vector spec does. Its fields must fit its kind."""
    kind = spec.kind
    for name, value, owner in (
        ("value", spec.value, "set"),
        ("bounds", spec.bounds, "bound"),
    ):
        if value is not None and kind != owner:
            raise refusal(
                f"{path}.{name}",
                f'found {shown(value)} with kind "{kind}", expected only with kind '
                f'"{owner}"',
            )
        if value is None and kind == owner:
            raise refusal(
                f"{path}.{name}", f'is missing, expected one with kind "{kind}"'
            )
    if kind in ("set", "bound") and spec.scale != 1.0:
        raise refusal(
            f"{path}.scale",
            f'found {shown(spec.scale)} with kind "{kind}", expected only with kind '
            '"add" or "scale"',
        )
    if kind == "scale":
        if spec.relative:
            raise refusal(f"{path}.relative", 'found true, expected false for "scale"')
        if spec.scale == 1.0:
            raise bad(f"{path}.scale", 1.0, "a factor other than 1, such as 0")
    if spec.bounds is not None:
        low, high = (round_to_fp32(bound) for bound in spec.bounds)
        if low > high:
            raise refusal(
                f"{path}.bounds",
                f"found [{low:g}, {high:g}], expected [low, high] with low <= high",
            )
        return VectorAction("bound", bounds=(low, high), relative=spec.relative)
    value = spec.scale if spec.value is None else spec.value
    return VectorAction(kind, round_to_fp32(value), relative=spec.relative)
