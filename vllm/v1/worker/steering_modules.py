# SPDX-License-Identifier: Apache-2.0
"""Builds a worker's sites at start-up: loads the modules, attaches them to layers."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from vllm.config.steering import ModuleInfo, SiteInfo, SteeringConfig, Tier
from vllm.logger import init_logger
from vllm.model_executor.layers.steering import (
    SAESlot,
    SAEWeights,
    SiteKey,
    SteeringBackend,
    SteeringSite,
    StepState,
    VectorSlot,
)
from vllm.model_executor.layers.steering_families import (
    DecoderLayer,
    attach_site,
    find_decoder_layers,
)
from vllm.model_executor.model_loader.sae_loader import load_site, load_vectors
from vllm.v1.worker.steering_tables import BoundTable, TableOf, decoder_norms

logger = init_logger(__name__)

# One bit of an int32 flag word per distinct set of skipped token ids.
MAX_SKIP_SETS = 31


class SkipSets:
    """Distinct skip sets of the modules, one flag bit each.

    `bits[id]` is the int32 flag word of token `id`.
    """

    def __init__(self, vocab_size: int):
        self.bits: np.ndarray = np.zeros(vocab_size, dtype=np.int32)
        self._masks: dict[tuple[int, ...], int] = {(): 0}

    def mask(self, module: ModuleInfo) -> int:
        """The flag mask of a module's skip set."""
        ids = tuple(sorted(set(module.skip_token_ids or ())))
        if ids not in self._masks:
            if len(self._masks) > MAX_SKIP_SETS:
                raise ValueError(
                    f"steering module {module.name}: skip_token_ids: more than "
                    f"{MAX_SKIP_SETS} distinct sets in one engine"
                )
            mask = 1 << (len(self._masks) - 1)
            self._masks[ids] = mask
            known = [i for i in ids if 0 <= i < len(self.bits)]
            self.bits[known] |= mask
        return self._masks[ids]


class SiteModules:
    """The sites of this rank and where each module's rows live in them."""

    def __init__(self, step: StepState):
        self.step = step
        self.sites: dict[SiteKey, SteeringSite] = {}
        self._bound: dict[Tier, dict[tuple[str, SiteKey], tuple[BoundTable, int]]] = {
            tier: {} for tier in Tier
        }

    def bind(
        self,
        tier: Tier,
        module: str,
        key: SiteKey,
        table: BoundTable,
        offset: int = 0,
    ) -> None:
        """Say which table holds a module's rows at a site."""
        self._bound[tier][module, key] = (table, offset)

    def table_of(self, tier: Tier) -> TableOf:
        """Looks up `(module, site) -> (table, offset)`; None: not on this rank."""
        bound = self._bound[tier]
        return lambda module, key: bound.get((module, key))

    def tables(self, tier: Tier) -> list[BoundTable]:
        """The tier's distinct tables."""
        unique = {id(table): table for table, _ in self._bound[tier].values()}
        return list(unique.values())

    @property
    def nbytes(self) -> int:
        """Device bytes of all sites and the step's index."""
        return sum(b.nbytes for b in nn.ModuleList(self.sites.values()).buffers())


class _Builder:
    """Carries what every step of the building needs."""

    def __init__(
        self,
        config: SteeringConfig,
        layers: dict[int, DecoderLayer],
        modules: SiteModules,
        skip_sets: SkipSets,
        num_rows: int,
        dtype: torch.dtype,
    ):
        self.config = config
        self.layers = layers
        self.modules = modules
        self.skip_sets = skip_sets
        self.num_rows = num_rows
        self.dtype = dtype
        self.device = modules.step.index.device

    def site_users(self) -> dict[SiteKey, list[tuple[ModuleInfo, SiteInfo]]]:
        """The modules at every site of this rank, in registration order."""
        users: dict[SiteKey, list[tuple[ModuleInfo, SiteInfo]]] = {}
        for module in self.config.modules.values():
            for site in module.sites:
                if site.layer in self.layers:
                    key = SiteKey(site.layer, site.hook)
                    users.setdefault(key, []).append((module, site))
        return users

    def sae_slot(self, module: ModuleInfo, site: SiteInfo, key: SiteKey) -> SAESlot:
        """Load one SAE and bind its rows."""
        weights = SAEWeights(site.d_sae, site.d_model, self.dtype, self.device)
        load_site(module, site, weights)
        guard, reference = module.norm_guard, module.reference_norm
        limit = guard * reference if guard and reference else None
        weights.set_meta(site, self.skip_sets.mask(module), limit)
        kinds = frozenset({site.activation})
        slot = SAESlot(weights, self.num_rows, self.config.max_clamps, kinds)
        scale = None
        if module.feature_units == "unit_decoder":
            scale = decoder_norms(weights.W_dec)
        for tier, table in ((Tier.DELTA, slot.delta), (Tier.FULL, slot.full)):
            self.modules.bind(tier, module.name, key, BoundTable(table, scale))
        return slot

    def vector_slot(
        self, users: list[tuple[ModuleInfo, SiteInfo]], key: SiteKey
    ) -> VectorSlot | None:
        """Stack the vectors of a site and bind their rows to one table."""
        if not users:
            return None
        count, d_model = len(users), users[0][1].d_model
        slot = VectorSlot(count, d_model, self.num_rows, count, self.device)
        table = BoundTable(slot.table)
        for at, (module, site) in enumerate(users):
            slot.directions[at].copy_(load_vectors(module, site))
            self.modules.bind(Tier.ADDITIVE, module.name, key, table, at)
        return slot


def build_site_modules(
    config: SteeringConfig,
    model: nn.Module,
    num_rows: int,
    max_tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    vocab_size: int,
) -> SiteModules:
    """Load every module's sites that this rank owns and attach them to the model.

    All modules are loaded and checked before the first layer is touched.

    Raises:
        ValueError: a module cannot be loaded, or the model's layers are unknown.
    """
    layers = find_decoder_layers(model)
    skip_sets = SkipSets(vocab_size)
    step = StepState(max_tokens, device, vocab_size)
    modules = SiteModules(step)
    builder = _Builder(config, layers, modules, skip_sets, num_rows, dtype)
    slots: dict[SiteKey, tuple[list[SAESlot], VectorSlot | None]] = {}
    for key, users in builder.site_users().items():
        saes = [builder.sae_slot(m, s, key) for m, s in users if m.kind == "sae"]
        vectors = [(m, s) for m, s in users if m.kind == "vectors"]
        slots[key] = (saes, builder.vector_slot(vectors, key))
    step.skip_bits.copy_(torch.from_numpy(skip_sets.bits))
    backend = make_backend(step, slots, dtype, device)
    for key, (saes, vector_slot) in slots.items():
        site = SteeringSite(key, saes, vector_slot, step, backend)
        modules.sites[key] = site
        attach_site(layers[key.layer], site)
    for info in config.modules.values():
        logger.info(
            "Steering module %s: %d site(s) [%s], digest %s",
            info.name,
            len(info.sites),
            ", ".join(f"{s.name} F={s.d_sae}" for s in info.sites),
            info.digest[:12],
        )
    logger.info("Steering buffers take %.1f MiB", modules.nbytes / 2**20)
    return modules


def make_backend(
    step: StepState,
    slots: dict[SiteKey, tuple[list[SAESlot], VectorSlot | None]],
    dtype: torch.dtype,
    device: torch.device,
) -> SteeringBackend:
    """The device's way to compute the tiers."""
    if device.type == "cpu":
        from vllm.model_executor.layers.steering_reference import ReferenceBackend

        return ReferenceBackend(step)
    from vllm.model_executor.layers.steering_kernel_backend import KernelBackend

    saes = [slot for group, _ in slots.values() for slot in group]
    vectors = [slot for _, slot in slots.values() if slot is not None]
    return KernelBackend(step, saes, vectors, dtype)
