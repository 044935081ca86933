# SPDX-License-Identifier: Apache-2.0
"""The engine core's registry: modules that come and go while requests run.

Reached as `collective_rpc("steering_modules", args=(action, payload))`, which every
client of an engine has, and handled here instead of in the workers. All of it runs
between two steps in the thread that schedules, so calls are serialised; only
`inspect`, which reads whole files, runs beside.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from vllm.config.sae_steering_parser import shown
from vllm.config.sae_steering_specs import EXTRA_ARGS_KEYS
from vllm.config.steering import ModuleInfo, SteeringConfig
from vllm.config.steering_slots import (
    NoRoomError,
    free_slots,
    module_bytes,
    with_module,
    without_module,
)
from vllm.engine.steering_active_config import active_steering_config, publish
from vllm.engine.steering_resolution import (
    SteeringConfigError,
    check_against_model,
    inspect_for_model,
)
from vllm.logger import init_logger
from vllm.model_executor.model_loader.sae_inspector import ModuleInspector

logger = init_logger(__name__)

METHOD = "steering_modules"
WORKER_METHOD = "change_steering_modules"
Reply = dict[str, Any]


def refusal(status: int, error: str, field: str | None = None, **more: Any) -> Reply:
    """What a caller gets instead of a result; `status` is an HTTP status."""
    return {"status": status, "error": error, "field": field, **more}


class SteeringRegistry:
    """Registers, replaces and removes the modules of one engine.

    Args:
        core: the `EngineCore`.
    """

    def __init__(self, core: Any):
        self.core = core
        self.lock = threading.Lock()
        self.inspector = ThreadPoolExecutor(1, "steering-inspect")

    def call(self, action: Any, payload: Any = None) -> Reply | Future[Reply]:
        """Run an action.

        Args:
            action: `list`, `stats`, `inspect` {name, path and options}, `register`
                {module, replace, drain}, `unregister` {name, drain}, or `release`
                {name}, which ends a drain.
            payload: the action's argument, a JSON object.

        Returns:
            `status` (200; 202: still draining, ask again; else refused) and the
            result, or `error`, `field`, and `in_use` where requests are in the way.
        """
        actions: dict[str, Callable[[dict[str, Any]], Reply | Future[Reply]]] = {
            "list": self._list,
            "stats": self._stats,
            "inspect": self._inspect,
            "register": self._register,
            "unregister": self._unregister,
            "release": self._release,
        }
        if type(action) is not str or action not in actions:
            known = ", ".join(actions)
            return refusal(400, f"found {shown(action)}, expected {known}", "action")
        if self.config is None:
            return refusal(409, "this engine was started without steering")
        if self.core.vllm_config.parallel_config.data_parallel_size > 1:
            return refusal(409, "modules cannot change under data parallelism")
        if action == "inspect":
            return self._inspect(payload or {})
        with self.lock:
            return actions[action](payload or {})

    @property
    def config(self) -> SteeringConfig:
        """The configuration that requests are admitted under."""
        config = active_steering_config(self.core.vllm_config, in_core=True)
        return config  # type: ignore[return-value]

    def in_use(self, name: str) -> int:
        """Requests that run or wait and name the module."""
        requests = self.core.scheduler.requests.values()
        return sum(not r.is_finished() and name in named_modules(r) for r in requests)

    def _list(self, payload: dict[str, Any]) -> Reply:
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
        return {"status": 200, "modules": modules, "free_slots": free}

    def _stats(self, payload: dict[str, Any]) -> Reply:
        replies = self._workers("stats")
        if error := first_error(replies):
            return refusal(500, error["error"])
        # Every rank has the same rows and tokens; bytes are per rank.
        return {
            "status": 200,
            **replies[0]["stats"],
            "bytes": [reply["stats"]["bytes"] for reply in replies],
        }

    def _inspect(self, payload: dict[str, Any]) -> Reply | Future[Reply]:
        return self.inspector.submit(self._inspected, dict(payload))

    def _inspected(self, options: dict[str, Any]) -> Reply:
        name = options.pop("name", None)
        try:
            module = inspect_for_model(
                name,
                options,
                self.core.vllm_config.model_config,
                module_inspector().inspect,
            )
        except SteeringConfigError as error:
            return refusal(400, str(error), "path")
        except Exception as error:
            logger.exception("Steering: inspecting %s failed", shown(name))
            text = " ".join(str(error).split()) or type(error).__name__
            return refusal(400, f"cannot be inspected: {text}", "path")
        return {"status": 200, "module": module.to_json()}

    def _register(self, payload: dict[str, Any]) -> Reply:
        module = ModuleInfo.from_json(payload["module"])
        name, config = module.name, self.config
        if name in config.modules and not payload.get("replace"):
            return refusal(
                409,
                f"module {shown(name)} is registered already, expected replace=true "
                "or another name",
                "name",
            )
        vllm_config = self.core.vllm_config
        try:
            check_against_model(module, vllm_config.model_config)
            may_add = vllm_config.model_config.enforce_eager
            after = with_module(config, module, may_add)
        except NoRoomError as error:
            return refusal(409, f"module {shown(name)}: {error}", "path")
        except SteeringConfigError as error:
            return refusal(400, str(error), "path")
        if name in config.modules:
            waiting = self._wait_for(name, bool(payload.get("drain")))
            if waiting is not None:
                return waiting
        after = dataclasses.replace(after, draining=config.draining - {name})
        return self._change(after, name)

    def _unregister(self, payload: dict[str, Any]) -> Reply:
        name, config = payload.get("name"), self.config
        if type(name) is not str or name not in config.modules:
            known = ", ".join(shown(n) for n in config.modules) or "none is loaded"
            return refusal(
                404, f"found {shown(name)}, expected a module: {known}", "name"
            )
        waiting = self._wait_for(name, bool(payload.get("drain")))
        if waiting is not None:
            return waiting
        return self._change(without_module(config, name), name)

    def _release(self, payload: dict[str, Any]) -> Reply:
        name, config = payload.get("name"), self.config
        if name in config.draining:
            self._publish(
                dataclasses.replace(config, draining=config.draining - {name})
            )
        return {"status": 200}

    def _wait_for(self, name: str, drain: bool) -> Reply | None:
        """What to answer while requests use the module; None when none does."""
        in_use = self.in_use(name)
        if not in_use:
            return None
        if not drain:
            return refusal(
                409,
                f"module {shown(name)} is in use by {in_use} request(s), expected "
                "none, or drain=true to wait for them",
                "name",
                in_use=in_use,
            )
        config = self.config
        if name not in config.draining:
            self._publish(
                dataclasses.replace(config, draining=config.draining | {name})
            )
        return {"status": 202, "in_use": in_use}

    def _change(self, after: SteeringConfig, name: str) -> Reply:
        """Bring every rank to `after`, or leave every rank as it was."""
        for_workers = dataclasses.replace(after, draining=frozenset()).to_json()
        error = first_error(self._workers("stage", for_workers, name))
        if error is None:
            error = first_error(self._workers("commit"))
        if error is not None:
            self._workers("rollback")
            status = 400 if error.get("refused") else 500
            return refusal(status, f"{error['error']}; nothing was changed", "path")
        self._publish(after)
        if error := first_error(self._workers("finish")):
            logger.error("Steering: freeing slots failed: %s", error["error"])
        module = after.modules.get(name)
        return {"status": 200, "module": None if module is None else module.to_json()}

    def _publish(self, config: SteeringConfig) -> None:
        # Deferred: this module may be what the engine core's seam is waiting for.
        from vllm.v1.engine.core import EngineCoreProc

        to_others = isinstance(self.core, EngineCoreProc)
        publish(self.core.vllm_config, config, to_others=to_others)

    def _workers(self, *args: Any) -> list[Reply]:
        return self.core.model_executor.collective_rpc(WORKER_METHOD, args=args)


@functools.cache
def module_inspector() -> ModuleInspector:
    """This process's inspector; it starts a helper process when it is first used."""
    return ModuleInspector()


def first_error(replies: list[Reply]) -> Reply | None:
    """The first reply of a rank that is not ok."""
    return next((reply for reply in replies if not reply["ok"]), None)


def named_modules(request: Any) -> set[str]:
    """The modules that an admitted request names."""
    params = request.sampling_params
    if params is None or not params.extra_args:
        return set()
    return {
        spec["module_name"]
        for key in EXTRA_ARGS_KEYS
        for spec in params.extra_args.get(key, ())
    }
