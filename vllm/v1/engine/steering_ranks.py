# SPDX-License-Identifier: Apache-2.0
"""Calls the steering registries of all data-parallel ranks from a front end.

Every rank has an engine core of its own. A change happens on all of them or on none:
all read it, all refuse new requests for the module, all put it in place, and only when
each has succeeded do they admit requests under it.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, TypeVar

from msgspec.structs import replace

from vllm.config.steering_json import Json
from vllm.config.steering_replies import (
    METHOD,
    ModuleReply,
    Outcome,
    as_reply,
)
from vllm.config.steering_shutdown import shutdown_has_ended
from vllm.engine.steering_active_config import take_over
from vllm.v1.engine.exceptions import EngineDeadError

if TYPE_CHECKING:
    from vllm.v1.engine.core_client import AsyncMPClient

T = TypeVar("T")

# What `EngineCoreProc` says of a call that comes while it shuts down.
ENGINE_STOPS = "Server shutting down"
_STOPPING = ModuleReply(
    outcome=Outcome.STOPPING,
    error="the server is shutting down; nothing was changed",
)

# Asks every rank; the replies are in the order of the ranks.
Ask = Callable[[str, Json], Awaitable[list[ModuleReply]]]


async def call_registries(
    client: AsyncMPClient, action: str, payload: Json
) -> ModuleReply:
    """Run an action of `SteeringRegistry.call` on every rank that the client manages.

    Returns:
        One reply for all. Counts are summed, `bytes` is a list over all workers.
    """

    engines = client.core_engines

    async def one(engine: bytes, action: str, payload: Json) -> ModuleReply:
        call = (METHOD, None, (action, payload), None)
        try:
            (answer,) = await _while_alive(
                client,
                client._call_utility_async("collective_rpc", *call, engine=engine),
            )
        except Exception as error:
            if _is_stopping(client, error):
                return _STOPPING
            # The other ranks must hear of it, so that they stay alike.
            if len(engines) == 1 or isinstance(error, EngineDeadError):
                raise
            return ModuleReply(outcome=Outcome.FAILED, error=str(error))
        return as_reply(answer)

    async def ask(action: str, payload: Json) -> list[ModuleReply]:
        calls = [one(engine, action, payload) for engine in engines]
        return list(await asyncio.gather(*calls))

    if action == "inspect":
        # The files are the same for every rank.
        reply = await one(engines[0], action, payload)
    elif len(engines) > 1 and action in TOGETHER:
        # Shielded, so that a cancelled caller does not leave the change half done.
        change = asyncio.create_task(TOGETHER[action](ask, action, payload))
        reply = await asyncio.shield(change)
    else:
        reply = merged(await ask(action, payload))
    take_over(client.vllm_config, reply.config)
    return reply


def _is_stopping(client: AsyncMPClient, error: Exception) -> bool:
    """Whether a call has failed because the server is shutting down.

    Until the front end has stopped the engine's processes, they refuse calls in words.
    """
    shuts_down = shutdown_has_ended(client.vllm_config) is not None
    return shuts_down or str(error) == ENGINE_STOPS


async def _while_alive(client: AsyncMPClient, call: Coroutine[None, None, T]) -> T:
    """The result of a call to an engine.

    vLLM leaves a call without an answer when the engine dies. Its caller would wait for
    ever, and the server, which waits for its callers, would not end.

    Raises:
        EngineDeadError: an engine of the client has died.
    """
    answer = asyncio.ensure_future(call)
    try:
        client.ensure_alive()
        client._ensure_output_queue_task()
        # Ends when an engine dies and when the client is shut down.
        reading = client.resources.output_queue_task
        await asyncio.wait((answer, reading), return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise EngineDeadError
        return answer.result()
    finally:
        answer.cancel()


async def change_together(ask: Ask, action: str, payload: Json) -> ModuleReply:
    """Register or unregister a module on every rank, or on none."""
    change = {**payload, "change": uuid.uuid4().hex}
    if action == "register":
        loaded = merged(await ask(action, {**change, "phase": "load"}))
        if loaded.outcome is Outcome.LOADING:
            return loaded
        if loaded.refused:
            return await _give_up(ask, change, loaded)
    closed = merged(await ask(action, {**change, "phase": "close"}))
    if closed.outcome is Outcome.DRAINING:
        return closed
    if closed.refused:
        return await _give_up(ask, change, closed)
    prepared = merged(await ask(action, {**change, "phase": "prepare"}))
    if prepared.outcome is not Outcome.DONE:
        await ask("rollback", change)
        return await _give_up(ask, change, prepared)
    return merged(await ask("finish", change))


async def change_presets_together(ask: Ask, action: str, payload: Json) -> ModuleReply:
    """Change presets, or the default preset, on every rank or on none."""
    change = {"change": uuid.uuid4().hex}
    phase = {**payload, **change, "phase": "prepare"}
    prepared = merged(await ask(action, phase))
    if prepared.outcome is not Outcome.DONE:
        await ask("rollback", change)
        return prepared
    return merged(await ask("finish", change))


async def _give_up(ask: Ask, change: Json, refusal: ModuleReply) -> ModuleReply:
    """Let every rank serve the module again; returns the refusal."""
    module = change.get("module") or change
    ended = {"name": module["name"], "caller": change.get("caller")}
    released = merged(await ask("release", ended))
    return replace(refusal, config=released.config)


def merged(replies: Sequence[ModuleReply]) -> ModuleReply:
    """One reply for those of all ranks.

    One rank's refusal is the reply for all; if there are several ranks, it names the
    rank. The configuration is the first rank's, because changes reach one rank in one
    order.
    """
    first = replies[0]
    for rank, reply in enumerate(replies):
        if reply.refused:
            where = f"data-parallel rank {rank}: " if len(replies) > 1 else ""
            error = where + reply.error
            return replace(reply, error=error, config=first.config)
    loading = [reply for reply in replies if reply.outcome is Outcome.LOADING]
    if loading:
        return replace(loading[0], config=first.config)
    waiting = [reply for reply in replies if reply.outcome is Outcome.DRAINING]
    if waiting:
        in_use = sum(reply.in_use or 0 for reply in waiting)
        return replace(waiting[0], in_use=in_use, config=first.config)
    return replace(
        first,
        listing=_sum_listings([reply.listing for reply in replies]),
        stats=_sum_stats([reply.stats for reply in replies]),
    )


def _sum_listings(listings: Sequence[Json | None]) -> Json | None:
    """The first rank's modules, with the requests and drains of all.

    While a change ends, some ranks list a module that others do not.
    """
    given = [listing for listing in listings if listing is not None]
    if not given:
        return None
    by_name: dict[str, list[Json]] = {}
    for listing in given:
        for row in listing["modules"]:
            by_name.setdefault(row["name"], []).append(row)
    modules = [
        {
            **first,
            "requests": sum(row["requests"] for row in by_name[first["name"]]),
            "draining": any(row["draining"] for row in by_name[first["name"]]),
        }
        for first in given[0]["modules"]
    ]
    return {**given[0], "modules": modules}


def _sum_stats(stats: Sequence[Json | None]) -> Json | None:
    """The sums of all ranks' counts, and their lists joined."""
    given = [one for one in stats if one is not None]
    return _added(given) if given else None


def _added(values: Sequence[Json]) -> Json:
    total: Json = {}
    for key in dict.fromkeys(key for value in values for key in value):
        column = [value[key] for value in values if key in value]
        first = column[0]
        if isinstance(first, dict):
            total[key] = _added(column)
        elif isinstance(first, (int, float)):
            total[key] = sum(column)
        elif key == "bytes":
            total[key] = [item for items in column for item in items]
        else:
            total[key] = first
    return total


# What changes something, and how several ranks do it.
TOGETHER = {
    "register": change_together,
    "unregister": change_together,
    "put_preset": change_presets_together,
    "delete_preset": change_presets_together,
    "set_default_preset": change_presets_together,
}
