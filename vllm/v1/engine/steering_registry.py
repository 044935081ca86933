# SPDX-License-Identifier: Apache-2.0
"""The engine core's registry, which changes modules while requests run.

Clients call `collective_rpc(METHOD, args=(action, payload))`, which every client of an
engine has. The engine core handles it here instead of in the workers. Calls run between
two steps in the scheduling thread, one after another. Only `inspect`, which reads whole
files, runs in a thread of its own.

Each data-parallel rank has an engine core, hence a registry, of its own. One rank
changes at once. Several change together in phases, which `steering_ranks.py` drives:
`close` refuses new requests for the module, `prepare` puts the change in place in the
workers, then `finish` admits requests under it, or `rollback` undoes it.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from msgspec.structs import replace

from vllm.config.sae_steering_specs import EXTRA_ARGS_KEYS
from vllm.config.steering import ModuleInfo, SteeringConfig
from vllm.config.steering_checks import SteeringConfigError, shown
from vllm.config.steering_json import Json
from vllm.config.steering_replies import ModuleReply, Outcome, RefusedCall
from vllm.config.steering_slots import (
    NoRoomError,
    free_slots,
    module_bytes,
    with_module,
    without_module,
)
from vllm.engine.steering_active_config import active_steering_config, publish
from vllm.engine.steering_presets import (
    refuse_without_default,
    warn_of_broken_presets,
    with_default,
    with_preset,
    with_valid_default,
    without_preset,
)
from vllm.engine.steering_resolution import (
    check_against_model,
    inspect_for_model,
)
from vllm.logger import init_logger
from vllm.model_executor.model_loader.sae_inspector import ModuleInspector
from vllm.v1.engine.steering_reads import ReadCounts

if TYPE_CHECKING:
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.request import Request

logger = init_logger(__name__)

WORKER_METHOD = "change_steering_modules"
# After this time, the caller of an unfinished change is taken to have given up.
PREPARED_LIMIT_S = 600.0

# What reads or writes the memory of workers.
NEEDS_WORKERS = ("register", "unregister", "finish", "rollback")

# Makes the configuration after a change from the change's payload.
Plan = Callable[[Json], SteeringConfig]


@dataclasses.dataclass(frozen=True)
class PreparedChange:
    """A change that the workers have made and that requests do not see yet."""

    ident: str
    name: str
    after: SteeringConfig
    since: float


class SteeringRegistry:
    """Registers, replaces and removes the modules of one engine core."""

    def __init__(self, core: EngineCore):
        self.core = core
        self.lock = threading.Lock()
        self.inspector = ThreadPoolExecutor(1, "steering-inspect")
        self.prepared: PreparedChange | None = None
        # The workers' last answer. While they sleep, their memory cannot be read.
        self.known_stats: list[Json] = []

    def call(
        self, action: str, payload: Json | None = None
    ) -> ModuleReply | Future[ModuleReply]:
        """Run an action.

        Args:
            action: `list`, `stats`, `inspect` {name, path and options}, `register`
                {module, replace, drain}, `unregister` {name, drain}, or `release`
                {name}, which ends a drain; `put_preset` {name, preset},
                `delete_preset` {name}, `set_default_preset` {name}. `register` and
                `unregister` with a `phase`
                (`close`, or `prepare` with a `change` id), then `finish` or
                `rollback` {change}, do a change step by step.
            payload: the action's argument, a JSON object.
        """
        actions: dict[str, Callable[[Json], ModuleReply]] = {
            "list": self._list,
            "stats": self._stats,
            "register": lambda p: self._change(p["module"]["name"], p, self._with),
            "unregister": lambda p: self._change(p.get("name"), p, self._without),
            "put_preset": self._put_preset,
            "delete_preset": self._delete_preset,
            "set_default_preset": self._set_default_preset,
            "finish": self._finish,
            "rollback": self._rollback,
            "release": self._release,
        }
        try:
            if active_steering_config(self.core.vllm_config) is None:
                raise RefusedCall(
                    Outcome.CONFLICT, "this engine was started without steering"
                )
            if action == "inspect":
                return self.inspector.submit(self._inspect, dict(payload or {}))
            if action not in actions:
                known = ", ".join(("inspect", *actions))
                raise RefusedCall(
                    Outcome.INVALID,
                    f"found {shown(action)}, expected {known}",
                    "action",
                )
            if action in NEEDS_WORKERS and self.asleep:
                raise RefusedCall(
                    Outcome.CONFLICT,
                    "the engine is asleep and has released the memory of its modules: "
                    "wake it up first",
                )
            with self.lock:
                reply = actions[action](payload or {})
        except RefusedCall as refused:
            reply = refused.reply
        config = active_steering_config(self.core.vllm_config)
        return replace(reply, config=None if config is None else config.to_json())

    @property
    def config(self) -> SteeringConfig:
        """The configuration that requests are admitted under."""
        config = active_steering_config(self.core.vllm_config)
        return config or SteeringConfig()

    @property
    def asleep(self) -> bool:
        """Whether the workers' weights, and so the modules, are off the device."""
        return "weights" in self.core.model_executor.sleeping_tags

    def in_use(self, name: str) -> int:
        """Requests that run or wait and name the module."""
        requests = self.core.scheduler.requests.values()
        return sum(not r.is_finished() and name in named_modules(r) for r in requests)

    def _list(self, payload: Json) -> ModuleReply:
        config = self.config
        item_bytes = self.core.vllm_config.model_config.dtype.itemsize
        modules = [
            {
                **module.to_json(),
                "weight_bytes": module_bytes(module, item_bytes),
                "requests": self.in_use(name),
                "draining": name in config.draining,
            }
            for name, module in config.modules.items()
        ]
        free = [{"id": i, **slot.to_json()} for i, slot in free_slots(config).items()]
        listing = {"modules": modules, "free_slots": free}
        return ModuleReply(outcome=Outcome.DONE, listing=listing)

    def _stats(self, payload: Json) -> ModuleReply:
        if not self.asleep:
            replies = self._workers("stats")
            if error := first_error(replies):
                raise RefusedCall(Outcome.FAILED, error["error"])
            self.known_stats = replies
        if not (replies := self.known_stats):
            text = "the engine is asleep, and nothing is known from before"
            raise RefusedCall(Outcome.CONFLICT, text)
        # Every rank has the same rows and tokens; bytes are per rank.
        stats = {
            **replies[0]["stats"],
            "bytes": [reply["stats"]["bytes"] for reply in replies],
            "read": self._read_counts(),
        }
        return ModuleReply(outcome=Outcome.DONE, stats=stats)

    def _read_counts(self) -> Json:
        """Tokens and bytes that were read, and stops, of every module."""
        reads = self.core.scheduler.sae_step_reads
        counts = {} if reads is None else reads.counts
        return {
            name: dataclasses.asdict(counts.get(name, ReadCounts()))
            for name in self.config.modules
        }

    def _inspect(self, options: Json) -> ModuleReply:
        name = options.pop("name", None)
        try:
            module = inspect_for_model(
                name,
                options,
                self.core.vllm_config.model_config,
                module_inspector().inspect,
            )
        except SteeringConfigError as error:
            text = str(error)
        except Exception as error:
            logger.exception("Steering: inspecting %s failed", shown(name))
            cause = " ".join(str(error).split()) or type(error).__name__
            text = f"cannot be inspected: {cause}"
        else:
            return ModuleReply(outcome=Outcome.DONE, module=module.to_json())
        return RefusedCall(Outcome.INVALID, text, "path").reply

    def _change(self, name: object, payload: Json, plan: Plan) -> ModuleReply:
        """Register or unregister a module, at once or one phase of it."""
        after = plan(payload)
        assert isinstance(name, str)  # the plan is for a module of this name
        phase = payload.get("phase")
        waiting = self._wait_for(name, bool(payload.get("drain")), phase == "close")
        if waiting is not None:
            return waiting
        if phase == "close":
            return ModuleReply(outcome=Outcome.DONE)
        self._prepare(name, after, payload.get("change", ""))
        if phase == "prepare":
            return ModuleReply(outcome=Outcome.DONE)
        return self._finish(payload)

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

    def _put_preset(self, payload: Json) -> ModuleReply:
        return self._changed_presets(with_preset(self.config, payload))

    def _delete_preset(self, payload: Json) -> ModuleReply:
        return self._changed_presets(without_preset(self.config, payload))

    def _set_default_preset(self, payload: Json) -> ModuleReply:
        return self._changed_presets(with_default(self.config, payload))

    def _changed_presets(self, after: SteeringConfig) -> ModuleReply:
        self._publish(after)
        return ModuleReply(outcome=Outcome.DONE)

    def _wait_for(self, name: str, drain: bool, close: bool) -> ModuleReply | None:
        """The answer while requests use the module, or None if none does.

        Args:
            name: of the module.
            drain: whether the caller waits.
            close: whether to refuse new requests for it even if none uses it now.
        """
        in_use = self.in_use(name)
        if in_use and not drain:
            raise RefusedCall(
                Outcome.CONFLICT,
                f"module {shown(name)} is in use by {in_use} request(s), expected "
                "none: set drain=true to wait for them",
                "name",
                in_use=in_use,
            )
        if in_use or close:
            self._set_draining(name, True)
        if not in_use:
            return None
        return ModuleReply(outcome=Outcome.DRAINING, in_use=in_use)

    def _release(self, payload: Json) -> ModuleReply:
        self._set_draining(payload.get("name"), False)
        return ModuleReply(outcome=Outcome.DONE)

    def _set_draining(self, name: object, draining: bool) -> None:
        config = self.config
        if name not in config.modules or (name in config.draining) == draining:
            return
        changed = config.draining ^ {str(name)}
        self._publish(dataclasses.replace(config, draining=changed))

    def _prepare(self, name: str, after: SteeringConfig, ident: str) -> None:
        """Bring every worker to `after`, or leave every worker as it was."""
        other = self.prepared
        if other is not None:
            if time.monotonic() - other.since < PREPARED_LIMIT_S:
                raise RefusedCall(
                    Outcome.CONFLICT,
                    f"a change of module {shown(other.name)} is under way: "
                    "try again when it has ended",
                    "name",
                )
            logger.error("Steering: a change of %s was given up", shown(other.name))
            self._undo()
        for_workers = after.for_workers().to_json()
        error = first_error(self._workers("stage", for_workers, name))
        if error is None:
            error = first_error(self._workers("commit"))
        if error is not None:
            self._workers("rollback")
            outcome = Outcome.INVALID if error.get("refused") else Outcome.FAILED
            raise RefusedCall(outcome, f"{error['error']}; nothing was changed", "path")
        self.prepared = PreparedChange(ident, name, after, time.monotonic())

    def _finish(self, payload: Json) -> ModuleReply:
        """Admit requests under the prepared change."""
        done = self.prepared
        if done is None or done.ident != payload.get("change", ""):
            raise RefusedCall(Outcome.FAILED, "no such change is prepared", "change")
        self.prepared = None
        warn_of_broken_presets(self.config, done.after, done.name)
        draining = self.config.draining - {done.name}
        self._publish(dataclasses.replace(done.after, draining=draining))
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
        self.prepared = None
        if error := first_error(self._workers("rollback")):
            logger.error("Steering: undoing a change failed: %s", error["error"])

    def _publish(self, config: SteeringConfig) -> None:
        version = self.config.version + 1
        publish(self.core.vllm_config, dataclasses.replace(config, version=version))

    def _workers(self, *args: object) -> list[Json]:
        return self.core.model_executor.collective_rpc(WORKER_METHOD, args=args)


@functools.cache
def module_inspector() -> ModuleInspector:
    """This process's inspector; it starts a helper process when it is first used."""
    return ModuleInspector()


def first_error(replies: list[Json]) -> Json | None:
    """The first reply of a rank that is not ok."""
    return next((reply for reply in replies if not reply["ok"]), None)


def named_modules(request: Request) -> set[str]:
    """The modules that an admitted request names."""
    params = request.sampling_params
    if params is None or not params.extra_args:
        return set()
    return {
        spec["module_name"]
        for key in EXTRA_ARGS_KEYS
        for spec in params.extra_args.get(key, ())
        if "module_name" in spec  # not a vector of the request's own
    }
