# SPDX-License-Identifier: Apache-2.0
"""Changes the modules of a running worker, in two phases.

`load` begins to read a module into host memory, and the engine goes on stepping; once
`loaded` says that it is there, `stage` checks it and changes nothing; `commit` copies
it into the slots and keeps what was there; then `finish` forgets that, or `rollback`
brings it back. The engine runs each on every rank before the next, between two steps,
and the last four only for modules that no request uses.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm.config.steering import ModuleInfo, SiteInfo, SteeringConfig, Tier
from vllm.config.steering_checks import WITHOUT_STEERING, one_line
from vllm.config.steering_json import Json
from vllm.config.steering_slots import skip_set, slots_of
from vllm.logger import init_logger
from vllm.model_executor.layers.steering_state import SAEWeights
from vllm.v1.worker.steering_counts import MAX_REMOVED, tokens_of_modules
from vllm.v1.worker.steering_module_loads import (
    LoadedSite,
    ModuleLoad,
    start_reading,
)
from vllm.v1.worker.steering_modules import SiteModules
from vllm.v1.worker.steering_places import Content, Place
from vllm.v1.worker.steering_runtime import SteeredRunner, SteeringRuntime

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger(__name__)


def log_change(old: ModuleInfo | None, new: ModuleInfo | None) -> None:
    """Say in the log what has become of a module; at least one of both is given."""
    if new is not None:
        done = "loaded" if old is None else "replaced"
        logger.info(
            "Steering module %s: %s, digest %s, from %s",
            new.name,
            done,
            new.digest[:12],
            new.path,
        )
    elif old is not None:
        logger.info("Steering module %s: removed", old.name)


@dataclass
class StagedModule:
    """A change from `old` to `new` (either may be None), on this rank.

    Attributes:
        before, after: the engine's configuration around it.
        weights: what each of `new`'s slots gets: an SAE, or a vector.
        scales: `BoundTable.unit_scale` of each of them.
        added: slots that are new with this change, not attached before `commit`.
        kept: what slots of both `old` and `new` held, once committed.
        old_scales: the scales that `old`'s slots had.
    """

    before: SteeringConfig
    after: SteeringConfig
    old: ModuleInfo | None
    new: ModuleInfo | None
    weights: dict[int, SAEWeights | torch.Tensor] = field(default_factory=dict)
    scales: dict[int, np.ndarray | None] = field(default_factory=dict)
    added: dict[int, Place] = field(default_factory=dict)
    kept: dict[int, Content] = field(default_factory=dict)
    old_scales: dict[int, np.ndarray | None] = field(default_factory=dict)
    committed: bool = False


class ModuleChanges:
    """One worker's side of registering, replacing and removing a module.

    Args:
        runtime: the worker's steering.
        forward_context: where ops find a site by its name.
    """

    def __init__(self, runtime: SteeringRuntime, forward_context: Json):
        self.runtime = runtime
        self.forward_context = forward_context
        self.staged: StagedModule | None = None
        self.loading: ModuleLoad | None = None
        # Modules that are gone and still counted, by the time of their removal.
        self.removed: dict[str, None] = {}

    @property
    def modules(self) -> SiteModules:
        return self.runtime.modules

    def load(self, module: ModuleInfo) -> None:
        """Begin to load a module, in place of one that is being loaded."""
        self.forget()
        self.loading = ModuleLoad(module, self.modules)

    def loaded(self) -> bool:
        """Whether the module is there.

        Raises:
            ValueError: as `ModuleLoad.result`.
            RuntimeError: no module is being loaded.
        """
        if self.loading is None:
            raise RuntimeError("steering: no module is being loaded")
        if not self.loading.done:
            return False
        self.loading.result()
        return True

    def forget(self) -> None:
        """Give up what is being loaded, or was loaded and not staged."""
        if self.loading is not None:
            self.loading.give_up()
        self.loading = None

    def stage(self, config: SteeringConfig, name: str) -> None:
        """Prepare what changes for the module `name`; attach nothing.

        Raises:
            ValueError: the module does not fit this rank's layers.
            RuntimeError: it was not loaded.
        """
        self.staged = None
        before = self.runtime.config
        old, new = before.modules.get(name), config.modules.get(name)
        change = StagedModule(before, config, old, new)
        known = slots_of(before)
        fresh = {at: slot for at, slot in slots_of(config).items() if at not in known}
        change.added = self.modules.make_places(fresh)
        if change.new is not None:
            found = self._take(change.new)
            for site, at in self.modules.own_sites(change.new):
                change.weights[at] = found[site].weights
                change.scales[at] = found[site].scale
        self.staged = change

    def _take(self, module: ModuleInfo) -> dict[SiteInfo, LoadedSite]:
        """What was loaded for the module, which is then forgotten here."""
        loading, self.loading = self.loading, None
        if loading is None or loading.module != module.unplaced():
            raise RuntimeError(f"steering: module {module.name!r} was not loaded")
        return loading.result()

    def commit(self) -> None:
        """Put the staged module in place."""
        change, modules = self._change(), self.modules
        self._synchronize()
        if change.old is not None:
            self._keep(change, change.old)
        # From here on something may be changed, and what a rollback needs is there.
        change.committed = True
        if change.old is not None:
            modules.unbind(change.old)
        if change.added:
            for site in modules.attach(change.added):
                self.forward_context[site.name] = site
        for at, content in change.weights.items():
            modules.places[at].fill(content)
        self.runtime.config = change.after
        if change.new is not None:
            self._bind(change.new, change.scales)
        self._synchronize()

    def finish(self) -> None:
        """Called when every rank has committed: silence the slots that were freed, and
        release the memory of slots that are gone."""
        change, self.staged = self._change(), None
        gone = set(slots_of(change.before)) - set(slots_of(change.after))
        if gone:
            self.modules.detach(gone)
            self.modules.shrink()
        if change.old is not None:
            left = self._ids(change.old) - set(change.weights)
            self.modules.clear_slots(left)
        self._follow_removals(change)
        log_change(change.old, change.new)

    def _follow_removals(self, change: StagedModule) -> None:
        """Forget the counts of the module that was removed first, if many are gone."""
        if change.new is not None:
            self.removed.pop(change.new.name, None)
        elif change.old is not None:
            self.removed[change.old.name] = None
        if len(self.removed) > MAX_REMOVED:
            first = next(iter(self.removed))
            del self.removed[first]
            self.runtime.counts.forget(first)
            self.modules.counts.forget(first)

    def rollback(self) -> None:
        """Undo `commit`, even if it failed half-way, or drop what was staged."""
        change, self.staged = self.staged, None
        if change is None or not change.committed:
            return
        modules = self.modules
        self._synchronize()
        if change.new is not None:
            modules.unbind(change.new)
        modules.clear_slots(set(change.weights) - set(change.kept))
        modules.detach(set(change.added))
        for at, content in change.kept.items():
            modules.places[at].restore(content)
        self.runtime.config = change.before
        if change.old is not None:
            self._bind(change.old, change.old_scales)
        self._synchronize()

    def stats(self) -> Json:
        """Rows in use per tier, tokens of tiers and of modules, and bytes held."""
        counts = self.runtime.steered_tokens
        return {
            "rows_in_use": {
                tier.name.lower(): manager.rows_in_use
                for tier, manager in self.runtime.managers.items()
            },
            "steered_tokens": {
                tier.name.lower(): {
                    "prefill": int(counts[tier, 0]),
                    "decode": int(counts[tier, 1]),
                }
                for tier in Tier
            },
            # This waits for the step in flight, at most once every few seconds.
            "module_tokens": tokens_of_modules(
                self.runtime.config.modules,
                self.runtime.counts.steered(),
                self.modules.counts.bypassed(),
                self.modules.counts.saturated(),
            ),
            "bytes": self.modules.nbytes,
            "modules": list(self.runtime.config.modules),
        }

    def _change(self) -> StagedModule:
        if self.staged is None:
            raise RuntimeError("steering: no change of modules is staged")
        return self.staged

    def _ids(self, module: ModuleInfo) -> set[int]:
        return {at for _, at in self.modules.own_sites(module)}

    def _keep(self, change: StagedModule, old: ModuleInfo) -> None:
        """Copy to the host what the change will overwrite."""
        for at in self._ids(old):
            place = self.modules.places[at]
            change.old_scales[at] = place.scale
            if at in change.weights:
                change.kept[at] = place.content()

    def _bind(self, module: ModuleInfo, scales: dict[int, np.ndarray | None]) -> None:
        modules = self.modules
        used = {skip_set(m) for m in self.runtime.config.modules.values()}
        modules.skip_sets.keep_only(used)
        modules.set_meta(module)
        modules.write_skip_bits()
        modules.bind(module, scales)

    def _synchronize(self) -> None:
        """Wait for the step in flight, and raise if a copy has failed."""
        device = self.modules.shape.device
        if device.type != "cpu":
            torch.accelerator.synchronize(device)


class SteeringWorkerMixin:
    """Gives a worker the method that the engine calls on every rank."""

    vllm_config: VllmConfig
    model_runner: SteeredRunner
    # Made when the modules first change.
    steering_module_changes: ModuleChanges | None = None

    def change_steering_modules(
        self, verb: str, config: Json | None = None, name: str = ""
    ) -> Json:
        """Run one verb of `ModuleChanges`; never raises.

        Args:
            verb: warm_up, load, loaded, forget, stage, commit, finish, rollback or
                stats.
            config: for stage, `SteeringConfig.to_json` after the change; for load,
                `ModuleInfo.to_json`.
            name: for stage, the module that changes.

        Returns:
            `ok`; `error`, one line, when not; `stats` for stats, `ready` for loaded.
        """
        try:
            changes = self._changes()
            if verb == "stage":
                changes.stage(SteeringConfig.from_json(config or {}), name)
            elif verb == "load":
                changes.load(ModuleInfo.from_json(config or {}))
            elif verb == "loaded":
                return {"ok": True, "ready": changes.loaded()}
            elif verb == "stats":
                return {"ok": True, "stats": changes.stats()}
            else:
                verbs = {
                    "warm_up": start_reading,
                    "forget": changes.forget,
                    "commit": changes.commit,
                    "finish": changes.finish,
                    "rollback": changes.rollback,
                }
                verbs[verb]()
        except (ValueError, MemoryError, torch.OutOfMemoryError) as error:
            return {"ok": False, "refused": True, "error": one_line(error)}
        except Exception as error:
            # A worker that raises would end the engine.
            logger.exception("Steering: %s of %s failed", verb, name or "a module")
            return {"ok": False, "refused": False, "error": one_line(error)}
        return {"ok": True}

    def _changes(self) -> ModuleChanges:
        runtime = self.model_runner.steering
        if runtime is None:
            raise ValueError(WITHOUT_STEERING)
        if self.steering_module_changes is None:
            context = self.vllm_config.compilation_config.static_forward_context
            self.steering_module_changes = ModuleChanges(runtime, context)
        return self.steering_module_changes
