# SPDX-License-Identifier: Apache-2.0
"""What the routes ask of the engine, over `EngineClient.collective_rpc`."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Coroutine, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from vllm.config.sae_labels import FILE_NAME, LabelIndex, load_labels
from vllm.config.sae_steering_parser import why_broken
from vllm.config.steering import ModuleInfo, SteeringConfig
from vllm.config.steering_checks import WITHOUT_STEERING, listing, shown
from vllm.config.steering_json import Json
from vllm.config.steering_replies import (
    KNOWN_VERSION,
    METHOD,
    UNFINISHED,
    ModuleReply,
    Outcome,
    as_reply,
)
from vllm.entrypoints.serve.steering.access import RequestRefused, allowed_path
from vllm.entrypoints.serve.steering.file_cache import FileCache
from vllm.entrypoints.serve.steering.protocol import RegisterRequest, check_features
from vllm.entrypoints.steering.statuses import HTTP_STATUS

if TYPE_CHECKING:
    from vllm.config import VllmConfig

POLL_S = 0.05
DRAIN_LIMIT_S = 600.0

# Returns when the caller of a route has gone away.
Leaving = Callable[[], Coroutine[None, None, None]]


class Engine(Protocol):
    """The part of `EngineClient` that is used."""

    vllm_config: VllmConfig

    async def collective_rpc(
        self,
        method: str,
        timeout: float | None = None,
        args: tuple = (),
        kwargs: dict | None = None,
    ) -> list: ...


_LABELS = FileCache(lambda path: LabelIndex(load_labels(path)))
_NO_LABELS = LabelIndex({})


def _labels_of(module_path: str) -> LabelIndex:
    """The labels beside a module's files; empty where there are none.

    Raises:
        RequestRefused: 409, the file is broken. Clients are not told where it is.
    """
    file = Path(module_path) / FILE_NAME
    try:
        return _LABELS.get(file) or _NO_LABELS
    except (OSError, ValueError) as error:
        reason = str(error).replace(str(file), FILE_NAME)
        raise RequestRefused(409, reason) from None


class SteeringModulesService:
    """Lists, registers and removes the modules of the server's engine."""

    def __init__(self, engine: Engine):
        self.engine = engine
        # Calls that wait for their turn, by action.
        self._waiting: dict[str, asyncio.Task[ModuleReply]] = {}
        self._turn = asyncio.Lock()
        self._searching = asyncio.Lock()
        # The version of a configuration, and what its presets are.
        self._presets: tuple[int, asyncio.Task[Sequence[Json]]] | None = None

    @property
    def steering(self) -> Json | None:
        """`additional_config.steering` of the engine, or None without steering."""
        additional = self.engine.vllm_config.additional_config
        return additional.get("steering") if isinstance(additional, dict) else None

    @property
    def _resolved(self) -> Json:
        """The configuration of the engine that this process knows."""
        return (self.steering or {}).get("resolved") or {}

    async def call(self, action: str, payload: Json) -> ModuleReply:
        """One action of the engine's registry.

        Raises:
            RequestRefused: the registry refuses; its message, and the status for it.
        """
        if self.steering is None:
            raise RequestRefused(409, WITHOUT_STEERING)
        asked = {**payload, KNOWN_VERSION: self._resolved.get("version")}
        (answer,) = await self.engine.collective_rpc(METHOD, args=(action, asked))
        reply = as_reply(answer)
        if reply.refused:
            status = HTTP_STATUS[reply.outcome]
            raise RequestRefused(status, reply.error, reply.field, reply.in_use)
        return reply

    async def _asked(self, action: str) -> ModuleReply:
        """The reply to an action that only looks.

        Clients without a key can ask as often as they like. So the engine is asked once
        at a time, and whoever asks meanwhile shares the next reply: nobody gets one
        that is older than the question.
        """
        waiting = self._waiting.get(action)
        if waiting is None:
            waiting = asyncio.create_task(self._in_turn(action))
            self._waiting[action] = waiting
        return await asyncio.shield(waiting)

    async def _in_turn(self, action: str) -> ModuleReply:
        async with self._turn:
            del self._waiting[action]
            return await self.call(action, {})

    async def config(self) -> SteeringConfig:
        """The engine's configuration as it is now."""
        reply = await self._asked("list")
        return SteeringConfig.from_json(reply.config or self._resolved)

    async def list(self) -> Json:
        """Modules with memory and requests, free slots, rows and tokens."""
        listed = (await self._asked("list")).listing or {}
        stats = (await self._asked("stats")).stats or {}
        # `listed` replaces the names in `stats` by the modules.
        return {**stats, **listed}

    async def get(self, name: str) -> Json:
        """One module, as `list` has it.

        Raises:
            RequestRefused: 404, there is no such module.
        """
        listed = (await self._asked("list")).listing or {}
        modules = {module["name"]: module for module in listed["modules"]}
        if name not in modules:
            known = listing(list(modules))
            raise RequestRefused(
                404, f"name: found {shown(name)}, expected a module: {known}", "name"
            )
        return modules[name]

    async def search_labels(
        self, name: str, query: str, index: int | None, limit: int
    ) -> Sequence[tuple[int, str]]:
        """Labels of a module that hold the query's words, or that of one feature."""
        asked = [] if index is None else [index]
        path = await self.path_of(name, asked)
        found = await asyncio.to_thread(_labels_of, path)
        if index is not None:
            label = found.labels.get(index)
            return [] if label is None else [(index, label)]
        # However many clients search, one thread of this process does.
        async with self._searching:
            return await asyncio.to_thread(found.search, query, limit)

    async def labels_among(self, name: str, features: Iterable[int]) -> dict[str, str]:
        """The labels of those of some features that have one, by index."""
        found = await asyncio.to_thread(_labels_of, await self.path_of(name))
        labels = found.labels
        return {str(index): labels[index] for index in features if index in labels}

    async def list_presets(self) -> Json:
        """Every preset, whether it is valid now, and the default."""
        config = await self.config()
        return {
            "presets": await self._checked(config),
            "default_preset": config.default_preset,
        }

    async def _checked(self, config: SteeringConfig) -> Sequence[Json]:
        """Every preset and whether it is valid, looked at once for a configuration.

        Hundreds of large presets take seconds, and clients without a key may ask.
        """
        if self._presets is None or self._presets[0] != config.version:
            checks = asyncio.create_task(asyncio.to_thread(_checked_presets, config))
            self._presets = config.version, checks
        try:
            return await asyncio.shield(self._presets[1])
        except Exception:
            self._presets = None  # the next one who asks tries again
            raise

    async def path_of(self, name: str, features: Iterable[int] = ()) -> str:
        """Where a module was loaded from that has these features.

        Raises:
            RequestRefused: 404, no module has this name; 400, it has fewer features.
        """
        module = await self.get(name)
        check_features(module, features)
        return module["path"]

    async def register(self, request: RegisterRequest, leaving: Leaving) -> Json:
        """Load a module; returns it as the engine describes it."""
        roots = (self.steering or {}).get("module_roots", ())
        # Links are resolved off the event loop: a root may be a slow network folder.
        path = await asyncio.to_thread(allowed_path, request.path, roots)
        described = {**request.options, "name": request.name, "path": path}
        try:
            inspected = await self.call("inspect", described)
        except RequestRefused as error:
            # Clients are not told where links lead.
            error.message = error.message.replace(path, request.path)
            raise
        payload = {
            "module": inspected.module,
            "replace": request.replace,
            "drain": request.drain,
        }
        reply = await self._drained("register", request.name, payload, leaving)
        return ModuleInfo.from_json(reply.module or {}).described()

    async def unregister(self, name: str, drain: bool, leaving: Leaving) -> None:
        """Remove a module."""
        payload = {"name": name, "drain": drain}
        await self._drained("unregister", name, payload, leaving)

    async def _drained(
        self, action: str, name: str, payload: Json, leaving: Leaving
    ) -> ModuleReply:
        """Repeat an action until the module is read and no request is in its way.

        A caller that goes away, or waits too long for requests, ends that: the module
        takes requests again, unless another caller drains it. What reading a module may
        take is limited by who reads.
        """
        deadline = time.monotonic() + DRAIN_LIMIT_S
        # Who else drains the module goes on when this caller leaves.
        caller = {"caller": uuid.uuid4().hex}
        unfinished = False
        gone = asyncio.create_task(leaving())
        try:
            while True:
                reply = await self.call(action, {**payload, **caller})
                unfinished = reply.outcome in UNFINISHED
                if not unfinished:
                    return reply
                if reply.outcome is Outcome.LOADING:
                    deadline = time.monotonic() + DRAIN_LIMIT_S
                elif time.monotonic() > deadline:
                    raise RequestRefused(
                        409,
                        f"module {name!r} is still in use by {reply.in_use} "
                        f"request(s) after {DRAIN_LIMIT_S:g} s, expected none",
                        "name",
                        reply.in_use,
                    )
                await asyncio.wait((gone,), timeout=POLL_S)
                if gone.done():
                    raise RequestRefused(408, "the caller disconnected", "drain")
        finally:
            gone.cancel()
            if unfinished:
                await asyncio.shield(self.call("release", {"name": name, **caller}))


def _checked_presets(config: SteeringConfig) -> Sequence[Json]:
    """Every preset, and why requests cannot run under it now, if they cannot."""
    return [
        {"name": name, "error": why_broken(preset, config), **preset}
        for name, preset in config.presets.items()
    ]
