# SPDX-License-Identifier: Apache-2.0
"""The engine core's registry, which changes modules while requests run.

Reached as `collective_rpc(METHOD, args=(action, payload))`, which every client of an
engine has. Changes run between two steps in the thread that schedules. What takes long
runs beside it: `inspect`, and the workers, read files; `PresetChecks` checks presets.
A lock keeps changes apart.

Each data-parallel rank has an engine core, hence a registry, of its own. One rank
changes at once. Several change together in phases, which `steering_ranks.py` drives:
`load` reads the module, `close` refuses new requests for it, `prepare` puts the change
in place in the workers, then `finish` admits requests under it, or `rollback` undoes
it.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from msgspec.structs import replace

from vllm.config.steering import ModuleInfo, SteeringConfig
from vllm.config.steering_checks import (
    WITHOUT_STEERING,
    SteeringConfigError,
    one_line,
    shown,
)
from vllm.config.steering_json import Json
from vllm.config.steering_replies import (
    KNOWN_VERSION,
    ModuleReply,
    Outcome,
    RefusedCall,
)
from vllm.config.steering_slots import (
    NoRoomError,
    with_module,
    without_module,
)
from vllm.engine.steering_active_config import (
    active_steering_config,
    may_register,
    publish,
)
from vllm.engine.steering_inspection import check_against_model, inspect_for_model
from vllm.engine.steering_presets import refuse_without_default, with_valid_default
from vllm.logger import init_logger
from vllm.model_executor.model_loader.sae_inspector import module_inspector
from vllm.v1.engine.steering_drains import Drains
from vllm.v1.engine.steering_listing import listing_of, requests_of, stats_of
from vllm.v1.engine.steering_loading import (
    ModuleLoads,
    first_error,
    inspection_refusal,
    refusal,
)
from vllm.v1.engine.steering_prepared import PREPARED_LIMIT_S, PreparedChange
from vllm.v1.engine.steering_preset_checks import CHANGES, PresetChecks

if TYPE_CHECKING:
    from vllm.v1.engine.core import EngineCore

logger = init_logger(__name__)

WORKER_METHOD = "change_steering_modules"
# Makes the configuration after a change of modules from the change's payload.
Plan = Callable[[Json], SteeringConfig]


class SteeringRegistry:
    """Registers, replaces and removes the modules of one engine core."""

    def __init__(self, core: EngineCore):
        self.core = core
        self.lock = threading.Lock()
        self.inspector = ThreadPoolExecutor(1, "steering-inspect")
        self.loads = ModuleLoads(self._workers)
        self.drains = Drains()
        self.presets = PresetChecks(lambda: self.config, self._keep_presets)
        self.prepared: PreparedChange | None = None
        # What the workers said last, for when they are asleep.
        self.known_stats: list[Json] = []
        if may_register(core.vllm_config):
            # The first client does not wait for helpers to start.
            self.inspector.submit(module_inspector().warm_up)
            self._workers("warm_up")

    def call(
        self, action: str, payload: Json | None = None
    ) -> ModuleReply | Future[ModuleReply]:
        """Run an action.

        Args:
            action: `list`, `stats`, `inspect` {name, path and options}, `register`
                {module, replace, drain}, `unregister` {name, drain}, or `release`
                {name}, which ends a load and the `caller`'s drain; `put_preset` {name,
                preset}; `delete_preset`, `set_default_preset` {name}. `register` and
                `unregister` with a `phase` (`load`, `close`, or `prepare` with a
                `change` id), then `finish` or `rollback` {change}, do a change step
                by step. `register` answers `LOADING` while the files are read.
            payload: the action's argument, a JSON object; see also `KNOWN_VERSION`.
        """
        payload = dict(payload or {})
        known = payload.pop(KNOWN_VERSION, None)
        actions: dict[str, Callable[[Json], ModuleReply]] = {
            "list": self._list,
            "stats": self._stats,
            "register": lambda p: self._change(p["module"]["name"], p, self._with),
            "unregister": lambda p: self._change(p.get("name"), p, self._without),
            "finish": self._finish,
            "rollback": self._rollback,
            "release": self._release,
        }
        try:
            if active_steering_config(self.core.vllm_config) is None:
                raise RefusedCall(Outcome.CONFLICT, WITHOUT_STEERING)
            if action == "inspect":
                return self.inspector.submit(self._inspect, payload)
            if action in CHANGES:
                with self.lock:
                    self._refuse_other_change()
                return self.presets.change(action, payload)
            if action not in actions:
                names = ", ".join(("inspect", *CHANGES, *actions))
                raise RefusedCall(
                    Outcome.INVALID,
                    f"found {shown(action)}, expected {names}",
                    "action",
                )
            with self.lock:
                reply = actions[action](payload)
        except RefusedCall as refused:
            reply = refused.reply
        config = active_steering_config(self.core.vllm_config)
        if config is None or config.version == known:
            return reply
        return replace(reply, config=config.to_json())

    @property
    def config(self) -> SteeringConfig:
        """The configuration that requests are admitted under."""
        config = active_steering_config(self.core.vllm_config)
        return config or SteeringConfig()

    @property
    def asleep(self) -> bool:
        """Whether the workers' weights, and so the modules, are off the device."""
        return "weights" in self.core.model_executor.sleeping_tags

    def _refuse_asleep(self) -> None:
        if self.asleep:
            raise RefusedCall(
                Outcome.CONFLICT,
                "the engine is asleep and has released the memory of its modules: "
                "wake it up first",
            )

    def _list(self, payload: Json) -> ModuleReply:
        listing = listing_of(self.core, self.config)
        return ModuleReply(outcome=Outcome.DONE, listing=listing)

    def _stats(self, payload: Json) -> ModuleReply:
        if not self.asleep:
            replies = self._workers("stats")
            if error := first_error(replies):
                raise RefusedCall(Outcome.FAILED, error["error"])
            self.known_stats = replies
        if not self.known_stats:
            text = "the engine is asleep, and nothing is known from before"
            raise RefusedCall(Outcome.CONFLICT, text)
        stats = stats_of(self.core, self.config, self.known_stats)
        return ModuleReply(outcome=Outcome.DONE, stats=stats)

    def _inspect(self, options: Json) -> ModuleReply:
        name = options.pop("name", None)
        try:
            inspect = module_inspector().inspect
            module = inspect_for_model(name, options, self.core.vllm_config, inspect)
        except SteeringConfigError as error:
            text = str(error)
        except Exception as error:
            logger.exception("Steering: inspecting %s failed", shown(name))
            text = f"cannot be inspected: {one_line(error)}"
        else:
            return ModuleReply(outcome=Outcome.DONE, module=module.to_json())
        return inspection_refusal(name, text).reply

    def _change(self, name: object, payload: Json, plan: Plan) -> ModuleReply:
        """Register or unregister a module, at once or one phase of it."""
        self._refuse_asleep()
        after = plan(payload)
        assert isinstance(name, str)  # the plan is for a module of this name
        new = after.modules.get(name)
        try:
            return self._change_to(after, name, new, payload)
        except RefusedCall:
            if new is not None:
                self.loads.forget(new)
            raise

    def _change_to(
        self, after: SteeringConfig, name: str, new: ModuleInfo | None, payload: Json
    ) -> ModuleReply:
        phase, drain = payload.get("phase"), bool(payload.get("drain"))
        done = ModuleReply(outcome=Outcome.DONE)
        if new is not None and phase != "close":
            if not drain:
                self._refuse_in_use(name)
            if not self.loads.ready(new):
                return ModuleReply(outcome=Outcome.LOADING)
        if phase == "load":
            return done
        waiting = self._wait_for(name, payload, phase == "close")
        if waiting is not None:
            return waiting
        if phase == "close":
            return done
        self._prepare(name, after, payload.get("change", ""))
        return done if phase == "prepare" else self._finish(payload)

    def _with(self, payload: Json) -> SteeringConfig:
        """The configuration with the payload's module in it."""
        module = ModuleInfo.from_json(payload["module"])
        name, config = module.name, self.config
        if name in config.modules and not payload.get("replace"):
            raise RefusedCall(
                Outcome.CONFLICT,
                f"module {shown(name)} is already registered, expected replace=true "
                "or another name",
                "name",
            )
        model_config = self.core.vllm_config.model_config
        try:
            check_against_model(module, model_config)
            after = with_module(config, module, model_config.enforce_eager)
        except NoRoomError as error:
            text = f"module {shown(name)}: {error}"
            raise RefusedCall(Outcome.CONFLICT, text, "path") from error
        except SteeringConfigError as error:
            raise RefusedCall(Outcome.INVALID, str(error), "path") from error
        return with_valid_default(after, name)

    def _without(self, payload: Json) -> SteeringConfig:
        """The configuration without the payload's module."""
        name, config = payload.get("name"), self.config
        if type(name) is not str or name not in config.modules:
            known = ", ".join(shown(n) for n in config.modules) or "none is loaded"
            raise RefusedCall(
                Outcome.UNKNOWN,
                f"found {shown(name)}, expected a module: {known}",
                "name",
            )
        refuse_without_default(config, name)
        return without_module(config, name)

    def _keep_presets(
        self, before: SteeringConfig, after: SteeringConfig, payload: Json
    ) -> ModuleReply | None:
        """Change presets, at once or by `prepare` and then `finish` or `rollback`.

        Args:
            before: the configuration that the change was checked under.
            after: what it makes of it.
            payload: of the call.

        Returns:
            None if the configuration has changed meanwhile.
        """
        with self.lock:
            if self.prepared is not None:
                raise self._under_way(self.prepared)
            if self.config.version != before.version:
                return None
            name, ident = str(payload.get("name")), payload.get("change", "")
            now = time.monotonic()
            self.prepared = PreparedChange(ident, name, after, now, by_workers=False)
            if payload.get("phase") == "prepare":
                return ModuleReply(outcome=Outcome.DONE)
            return self._finish(payload)

    def _refuse_in_use(self, name: str) -> None:
        if in_use := requests_of(self.core, name):
            raise RefusedCall(
                Outcome.CONFLICT,
                f"module {shown(name)} is in use by {in_use} request(s), expected "
                "none: set drain=true to wait for them",
                "name",
                in_use=in_use,
            )

    def _wait_for(self, name: str, payload: Json, close: bool) -> ModuleReply | None:
        """The answer while requests use the module, or None if none does.

        Args:
            name: of the module.
            payload: of the call: whether the caller waits (`drain`), and its `caller`.
            close: whether to refuse new requests for it even if none uses it now.
        """
        if not payload.get("drain"):
            self._refuse_in_use(name)
        in_use = requests_of(self.core, name)
        if in_use or close:
            self.drains.join(name, str(payload.get("caller")))
            self._set_draining(name, True)
        if not in_use:
            return None
        return ModuleReply(outcome=Outcome.DRAINING, in_use=in_use)

    def _release(self, payload: Json) -> ModuleReply:
        name = str(payload.get("name"))
        if self.drains.leave(name, str(payload.get("caller"))):
            self._set_draining(name, False)
        self.loads.forget_name(name)
        return ModuleReply(outcome=Outcome.DONE)

    def _set_draining(self, name: str, draining: bool) -> None:
        config = self.config
        if name in config.modules and (name in config.draining) != draining:
            changed = config.draining ^ {name}
            self._publish(dataclasses.replace(config, draining=changed))

    def _refuse_other_change(self) -> None:
        """Raise while another change is prepared; undo one that was given up."""
        other = self.prepared
        if other is None:
            return
        if time.monotonic() - other.since < PREPARED_LIMIT_S:
            raise self._under_way(other)
        logger.error("Steering: a change of %s was given up", shown(other.name))
        self._undo()

    @staticmethod
    def _under_way(other: PreparedChange) -> RefusedCall:
        return RefusedCall(
            Outcome.CONFLICT,
            f"a change of {shown(other.name)} is under way: try again when it has "
            "ended",
            "name",
        )

    def _prepare(self, name: str, after: SteeringConfig, ident: str) -> None:
        """Bring every worker to `after`, or leave every worker as it was."""
        self._refuse_other_change()
        for_workers = after.for_workers().to_json()
        error = first_error(self._workers("stage", for_workers, name))
        if error is None:
            error = first_error(self._workers("commit"))
        self.loads.staged()
        if error is not None:
            self._workers("rollback")
            raise refusal(error)
        self.prepared = PreparedChange(ident, name, after, time.monotonic())

    def _finish(self, payload: Json) -> ModuleReply:
        """Admit requests under the prepared change."""
        done = self.prepared
        if done is None or done.ident != payload.get("change", ""):
            raise RefusedCall(Outcome.FAILED, "no such change is prepared", "change")
        draining = self.config.draining
        if done.by_workers:
            self._refuse_asleep()
            draining -= {done.name}
            self.drains.end(done.name)
            self.presets.warn(self.config, done.after, done.name)
        self.prepared = None
        self._publish(dataclasses.replace(done.after, draining=draining))
        if not done.by_workers:
            return ModuleReply(outcome=Outcome.DONE)
        if error := first_error(self._workers("finish")):
            logger.error("Steering: freeing slots failed: %s", error["error"])
        module = done.after.modules.get(done.name)
        info = None if module is None else module.to_json()
        return ModuleReply(outcome=Outcome.DONE, module=info)

    def _rollback(self, payload: Json) -> ModuleReply:
        """Undo the prepared change, if it is the caller's."""
        if self.prepared is not None and self.prepared.ident == payload.get("change"):
            self._undo()
        return ModuleReply(outcome=Outcome.DONE)

    def _undo(self) -> None:
        change = self.prepared
        if change is not None and change.by_workers:
            self._refuse_asleep()
            if error := first_error(self._workers("rollback")):
                logger.error("Steering: undoing a change failed: %s", error["error"])
        self.prepared = None

    def _publish(self, config: SteeringConfig) -> None:
        version = self.config.version + 1
        publish(self.core.vllm_config, dataclasses.replace(config, version=version))

    def _workers(self, *args: object) -> list[Json]:
        return self.core.model_executor.collective_rpc(WORKER_METHOD, args=args)
