# SPDX-License-Identifier: Apache-2.0
"""What a request does at one site, and the bytes that identify it.

Blocks are tagged, and their parts are preceded by their length. So no two contents
share an encoding.
"""

from __future__ import annotations

import functools
import hashlib
import struct
from collections.abc import Mapping, Sequence

import msgspec

from vllm.config.sae_steering_specs import (
    CLAMP_KINDS,
    VECTOR_KINDS,
    SAEClampEntry,
    SAECondition,
)
from vllm.config.sae_steering_vector_action import VectorAction
from vllm.config.steering import ModuleInfo, Tier
from vllm.config.steering_points import HookPoint

# Feature, kind, value, only_if_active; the condition's kind (0: none), feature, bound.
_CLAMP_RECORD = struct.Struct("<QBf?BQf")
# Kind, relative, value, bounds.
_VECTOR_RECORD = struct.Struct("<B?fff")

# A tag's length and the number of parts; the length of a part.
_HEAD, _LENGTH = struct.Struct("<IQ"), struct.Struct("<Q")
_TIER_TAGS = {tier: f"tier.{tier.name.lower()}" for tier in Tier}


class SiteEdit(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What one module does at one site.

    Attributes:
        entries: clamps of an SAE, sorted by feature.
        actions: of a vector module instead, the one thing that it does.
    """

    module: str
    hook: HookPoint
    layer: int
    entries: tuple[SAEClampEntry, ...] = ()
    actions: tuple[VectorAction, ...] = ()

    @property
    def clamps(self) -> tuple[SAEClampEntry, ...] | tuple[VectorAction, ...]:
        """What is clamped, whichever kind the module is."""
        return self.entries or self.actions


def module_fingerprint(module: ModuleInfo) -> str:
    """Identifies what a module does: its content digest and its bypassed tokens.

    The bypassed ids are not in the content digest, because the default depends on
    the model that the module is loaded for.
    """
    skipped = module.skip_token_ids
    ids = "default" if skipped is None else ",".join(map(str, sorted(skipped)))
    return f"{module.digest}/skip={ids}"


def digest_of(blocks: Sequence[bytes]) -> str | None:
    """SHA-256 (hex) of some tiers' blocks; None if there is none."""
    if not blocks:
        return None
    return hashlib.sha256(_block("vllm.steering.v2", *blocks)).hexdigest()


def _block(tag: str, *parts: bytes) -> bytes:
    """A tag and its parts, each preceded by its length."""
    return _head(tag, len(parts)) + b"".join(
        [piece for part in parts for piece in (_LENGTH.pack(len(part)), part)]
    )


def _head(tag: str, parts: int) -> bytes:
    return _HEAD.pack(len(tag), parts) + tag.encode()


def tier_block(
    tier: Tier, edits: Sequence[SiteEdit], module_digests: Mapping[str, str]
) -> bytes:
    """The block of a tier's edits; `module_digests` has each module that they name."""
    blocks = [_edit_block(edit, module_digests[edit.module]) for edit in edits]
    return _block(_TIER_TAGS[tier], *blocks)


def _edit_block(edit: SiteEdit, module_digest: str) -> bytes:
    record = b"".join(
        [_clamp_record(clamp) for clamp in edit.entries]
        or [_vector_record(action) for action in edit.actions]
    )
    place = _place_block(edit.module, module_digest, edit.hook, edit.layer)
    return place + _LENGTH.pack(len(record)) + record


@functools.lru_cache(maxsize=4096)
def _place_block(module: str, module_digest: str, hook: HookPoint, layer: int) -> bytes:
    """An edit's block up to its last part, which says what is done there."""
    parts = (
        module.encode("utf-8", "surrogatepass"),
        module_digest.encode(),
        hook.value.encode(),
        _LENGTH.pack(layer),
    )
    body = [piece for part in parts for piece in (_LENGTH.pack(len(part)), part)]
    return _head("edit", len(parts) + 1) + b"".join(body)


def _vector_record(action: VectorAction) -> bytes:
    """Fixed width, so that a list of records needs no lengths."""
    kind = VECTOR_KINDS.index(action.kind)
    return _VECTOR_RECORD.pack(kind, action.relative, action.value, *action.bounds)


def _clamp_record(clamp: SAEClampEntry) -> bytes:
    """Fixed width, so that a list of records needs no lengths."""
    return _CLAMP_RECORD.pack(
        clamp.feature_idx,
        CLAMP_KINDS.index(clamp.kind),
        clamp.value,
        clamp.only_if_active,
        *_condition_record(clamp.when),
    )


def _condition_record(when: SAECondition | None) -> tuple[int, int, float]:
    if when is None:
        return 0, 0, 0.0
    if when.above is not None:
        return 1, when.feature_idx, when.above
    return 2, when.feature_idx, when.below or 0.0
