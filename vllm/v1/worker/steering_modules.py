# SPDX-License-Identifier: Apache-2.0
"""The slots of a worker's sites. They are built at start-up and filled with modules.

The engine decides which slot holds which module (`ModuleInfo.slots`). A worker builds
the slots of the layers that it owns. A slot's buffers never move, so the addresses in
captured graphs stay valid whatever module the slot holds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from vllm.config.sae_readout_specs import SiteRead
from vllm.config.steering import (
    Activation,
    InlineSite,
    ModuleInfo,
    SiteInfo,
    SlotInfo,
    Tier,
)
from vllm.config.steering_slots import skip_set
from vllm.model_executor.layers.steering import SiteKey, SteeringBackend, SteeringSite
from vllm.model_executor.layers.steering_attach import attach_site, check_site
from vllm.model_executor.layers.steering_families import (
    DecoderLayer,
    parts_of,
    refuse_output_norm,
)
from vllm.model_executor.layers.steering_norms import fold_norm_gain
from vllm.model_executor.layers.steering_read_state import ReadBuffers
from vllm.model_executor.layers.steering_shards import WHOLE, Shard
from vllm.model_executor.layers.steering_state import SAESlot, SAEWeights, StepState
from vllm.model_executor.layers.steering_value_bias import fold_value_bias
from vllm.model_executor.model_loader.sae_loader import load_site
from vllm.v1.worker.steering_counts import DeviceCounts
from vllm.v1.worker.steering_inline import InlineVectors, make_stack
from vllm.v1.worker.steering_places import Place, SAEPlace, VectorPlace, make_backend
from vllm.v1.worker.steering_shape import SteeringShape
from vllm.v1.worker.steering_skip_sets import SkipSets
from vllm.v1.worker.steering_tables import BoundTable, TableOf


class SiteModules:
    """The sites of this rank, their slots, and where each module's rows live.

    Rows are looked up by module and `SiteKey(layer, hook)`: a module has at most one
    site that reads a given point.
    """

    def __init__(
        self,
        layers: dict[int, DecoderLayer],
        shape: SteeringShape,
        shard: Shard = WHOLE,
    ):
        self.layers = layers
        self.shape = shape
        self.shard = shard
        self.step = StepState(shape.max_tokens, shape.device, shape.vocab_size)
        self.skip_sets = SkipSets(shape.vocab_size)
        self.sites: dict[SiteKey, SteeringSite] = {}
        self.places: dict[int, Place] = {}
        # None while this rank has no slot.
        self.backend: SteeringBackend | None = None
        self._bound: dict[Tier, dict[tuple[str, SiteKey], tuple[BoundTable, int]]] = {
            tier: {} for tier in Tier
        }
        self._read_slots: dict[tuple[str, SiteKey], int] = {}
        self.inline = InlineVectors()
        self.counts = DeviceCounts(self.step, self.inline)

    def shard_of(self, sharded: bool) -> Shard:
        """What this rank holds of an SAE that the ranks share, or do not."""
        return self.shard if sharded else WHOLE

    def table_of(self, tier: Tier) -> TableOf:
        """Looks up `(module, site) -> (table, offset)`, or None if not on this rank."""
        bound, inline = self._bound[tier], self.inline
        return lambda module, key: bound.get((module, key)) or inline.find(module, key)

    def tables(self, tier: Tier) -> list[BoundTable]:
        """The tier's distinct tables, including those of free slots."""
        found: dict[int, BoundTable] = {}
        for place in self.places.values():
            table = place.tables.get(tier)
            if table is not None:
                found[id(table)] = table
        return list(found.values())

    def read_slot(self, read: SiteRead) -> int | None:
        """The slot that holds what a request reads, or None if not on this rank."""
        key = SiteKey(read.layer, read.hook)
        return self._read_slots.get((read.module, key))

    def sae_slot(self, module: str, key: SiteKey) -> SAESlot | None:
        """The slot of an SAE module's site, or None if not on this rank."""
        bound, _ = self._bound[Tier.FULL].get((module, key), (None, 0))
        slots = (
            place.slot
            for place in self.places.values()
            if isinstance(place, SAEPlace) and place.tables[Tier.FULL] is bound
        )
        return next(slots, None)

    def read_buffers(self) -> dict[int, ReadBuffers]:
        """The reading buffers of this rank's SAE slots, by slot."""
        return {
            at: place.reads
            for at, place in self.places.items()
            if place.reads is not None
        }

    @property
    def nbytes(self) -> int:
        """Device bytes of all sites and the step's index."""
        return sum(b.nbytes for b in nn.ModuleList(self.sites.values()).buffers())

    def own_sites(self, module: ModuleInfo) -> list[tuple[SiteInfo, int]]:
        """A module's sites on this rank, and the slot of each."""
        assert module.slots is not None
        pairs = zip(module.sites, module.slots, strict=True)
        return [(site, slot) for site, slot in pairs if site.layer in self.layers]

    def make_places(
        self, slots: dict[int, SlotInfo], inline: Sequence[InlineSite] = ()
    ) -> dict[int, Place]:
        """Empty slots for `{id: slot}`, attached to nothing yet.

        Args:
            slots: to make.
            inline: sites with room for the vectors of requests, behind the slots of
                their stack. The place of that room has an id below 0.

        Raises:
            ValueError: a layer lacks a slot's point.
        """
        places: dict[int, Place] = {}
        room = {
            SiteKey(site.layer, site.hook): site
            for site in inline
            if site.layer in self.layers
        }
        for key in room:
            check_site(self.layers[key.layer], key)
        stacks: dict[SiteKey, list[int]] = {key: [] for key in room}
        for at, slot in slots.items():
            if slot.layer not in self.layers:
                continue
            key = SiteKey(slot.layer, slot.hook, slot.hook_out)
            check_site(self.layers[slot.layer], key)
            if slot.kind == "vectors":
                stacks.setdefault(key, []).append(at)
            else:
                places[at] = self._sae_place(key, slot)
        for key, ids in stacks.items():
            stack = make_stack(
                len(ids),
                room.get(key),
                self.shape.widths.of(key.hook),
                self.shape.num_rows,
                self.shape.device,
            )
            tables = {Tier.ADDITIVE: stack.table}
            for row, at in enumerate(ids):
                places[at] = VectorPlace(key, tables, row, stack.slot)
            if key in room:
                self.inline.stacks[key] = stack
                at = -len(self.inline.stacks)
                places[at] = VectorPlace(key, tables, len(ids), stack.slot)
        return places

    def _sae_place(self, key: SiteKey, slot: SlotInfo) -> SAEPlace:
        shape, shard = self.shape, self.shard_of(slot.sharded)
        d_in, d_out = shape.widths.of(slot.hook), shape.widths.of(slot.out_hook)
        weights = SAEWeights(
            slot.width, d_in, shape.dtype, shape.device, d_out, slot.has_skip, shard,
            # Ranks that gather do not run the kernels that screen.
            slot.screened and (shard.is_whole or shard.allocate is not None),
        )  # fmt: skip
        kinds: set[Activation] = {Activation.TOPK} if slot.topk else set()
        if slot.threshold:
            kinds |= {Activation.RELU, Activation.JUMPRELU}
        sae = SAESlot(
            weights,
            shape.num_rows,
            shape.max_clamps,
            frozenset(kinds),
            reads_source=slot.hook_out is not None,
        )
        if shape.max_read:
            sae.reads = ReadBuffers(
                shape.num_rows,
                shape.max_clamps,
                shape.max_tokens,
                slot.width,
                shape.device,
                shape.max_read,
            )
        tables = {
            Tier.DELTA: BoundTable(sae.delta),
            Tier.FULL: BoundTable(sae.full),
        }
        return SAEPlace(key, tables, 0, sae)

    def attach(self, places: dict[int, Place]) -> list[SteeringSite]:
        """Add slots to their sites, and new sites to their layers.

        Returns:
            the sites that are new.
        """
        made = []
        self.places = dict(sorted({**self.places, **places}.items()))
        backend = self._make_backend()
        for key in dict.fromkeys(place.key for place in places.values()):
            site = self.sites.get(key)
            if site is None:
                site = SteeringSite(key, (), None, self.step, backend)
                self.sites[key] = site
                made.append(site)
            self._fill_site(site)
        for site in made:
            attach_site(self.layers[site.key.layer], site)
        self._use(backend)
        return made

    def detach(self, ids: set[int]) -> None:
        """Remove slots from their sites. A site without slots edits nothing."""
        gone = [self.places.pop(at) for at in ids if at in self.places]
        for key in {place.key for place in gone}:
            self._fill_site(self.sites[key])

    def shrink(self) -> None:
        """Release the working memory that only removed slots needed."""
        if self.places:
            self._use(self._make_backend())

    def _make_backend(self) -> SteeringBackend:
        return make_backend(self.step, self.places, self.shape.dtype)

    def _fill_site(self, site: SteeringSite) -> None:
        """Give a site its slots, in the order of their ids."""
        places = [place for place in self.places.values() if place.key == site.key]
        saes = [place.slot for place in places if isinstance(place, SAEPlace)]
        stacks = [place.slot for place in places if isinstance(place, VectorPlace)]
        site.saes = nn.ModuleList(saes)
        site.vectors = stacks[0] if stacks else None

    def _use(self, backend: SteeringBackend) -> None:
        for site in self.sites.values():
            site.backend = backend
        self.backend = backend

    def bind(self, module: ModuleInfo, scales: dict[int, np.ndarray | None]) -> None:
        """From now on, a module's rows are written to its slots.

        Args:
            module: whose weights the slots hold.
            scales: `BoundTable.unit_scale` of each slot.
        """
        for site, at in self.own_sites(module):
            key, place = SiteKey(site.layer, site.hook), self.places[at]
            place.set_scale(scales.get(at))
            if place.reads is not None:
                self._read_slots[module.name, key] = at
            for tier, table in place.tables.items():
                self._bound[tier][module.name, key] = (table, place.offset)
        places = [self.places[at] for _, at in self.own_sites(module)]
        self.counts.bind(module.name, places, self.skip_sets.mask(skip_set(module)))

    def unbind(self, module: ModuleInfo) -> None:
        """Forget where a module's rows live, and clear its own tables."""
        self.counts.unbind(module.name)
        for site, at in self.own_sites(module):
            key, place = SiteKey(site.layer, site.hook), self.places.get(at)
            for tier in Tier:
                self._bound[tier].pop((module.name, key), None)
            self._read_slots.pop((module.name, key), None)
            if place is not None:
                place.forget_rows()

    def set_meta(self, module: ModuleInfo) -> None:
        """Write the scalars of a module's slots; its weights are in place."""
        mask = self.skip_sets.mask(skip_set(module))
        guard, reference = module.norm_guard, module.reference_norm
        limit = guard * reference if guard and reference else None
        for site, at in self.own_sites(module):
            self.places[at].set_meta(site, mask, limit)

    def write_skip_bits(self) -> None:
        """Upload the flag words, in place."""
        self.step.skip_bits.copy_(torch.from_numpy(self.skip_sets.bits))

    def load(self, module: ModuleInfo, site: SiteInfo, into: SAEWeights) -> None:
        """Stream one site's SAE into its buffers, with a norm's gain folded in if
        needed.

        Raises:
            ValueError: as `load_site`, `check_layer` and `fit`.
        """
        self.check_layer(site)
        load_site(module, site, into)
        self.fit(site, into)
        into.refresh()

    def check_layer(self, site: SiteInfo) -> None:
        """Check that an SAE is of what its layer writes, before it is loaded.

        Raises:
            ValueError: the layer norms an output that the SAE takes as it is.
        """
        if site.raw_output:
            refuse_output_norm(self.layers[site.layer], site.out_hook)

    def fit(self, site: SiteInfo, into: SAEWeights) -> None:
        """Fit a loaded SAE to its layer's point.

        Raises:
            ValueError: the gain of a norm cannot be divided out, or the layer has no
                known projection of values.
        """
        parts = parts_of(self.layers[site.layer])
        if site.before_gain:
            fold_norm_gain(into, site.d_sae, parts.mid_norm)
        if site.before_value_bias:
            fold_value_bias(into, site.d_sae, parts.attention)

    def clear_slots(self, ids: set[int]) -> None:
        """Make slots silent."""
        for at in ids & set(self.places):
            self.places[at].clear()
