# SPDX-License-Identifier: Apache-2.0
"""Clients that only look cannot make the engine answer each of them, and work for
clients that have gone away ends."""

from __future__ import annotations

import asyncio
import time
from argparse import Namespace
from typing import Any, cast

import pytest
from starlette.requests import Request

from vllm.config.sae_labels import LabelIndex
from vllm.config.steering import SteeringConfig
from vllm.config.steering_json import Json
from vllm.entrypoints.serve.steering import service as service_module
from vllm.entrypoints.serve.steering.access import RequestRefused, holds_key
from vllm.entrypoints.serve.steering.routing import read_body, while_connected
from vllm.entrypoints.serve.steering.service import Engine, SteeringModulesService


class CountingEngine:
    """Says how often it was asked before; each answer takes two turns of the loop."""

    def __init__(self) -> None:
        additional = {"steering": {"modules": {}}}
        self.vllm_config = Namespace(additional_config=additional)
        self.asked = 0
        self.fails = False

    async def collective_rpc(
        self,
        method: str,
        timeout: float | None = None,
        args: tuple = (),
        kwargs: dict | None = None,
    ) -> list[Any]:
        self.asked += 1
        modules = [{"name": f"m{self.asked}", "path": "/x"}]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        if self.fails:
            raise RuntimeError("gone")
        return [{"outcome": "done", "listing": {"modules": modules}, "stats": {}}]


def service_of(engine: CountingEngine) -> SteeringModulesService:
    return SteeringModulesService(cast(Engine, engine))


async def names(service: SteeringModulesService) -> list[str]:
    return [module["name"] for module in (await service.list())["modules"]]


def test_clients_that_ask_meanwhile_share_the_next_reply() -> None:
    engine = CountingEngine()
    service = service_of(engine)

    async def look() -> list[list[str]]:
        first = asyncio.create_task(names(service))
        await asyncio.sleep(0)
        await asyncio.sleep(0)  # the engine is asked; these come too late for that
        return await asyncio.gather(first, *(names(service) for _ in range(50)))

    first, *others = asyncio.run(look())
    assert first == ["m1"]
    # One reply for all of them, and it is younger than their question.
    assert len({tuple(found) for found in others}) == 1
    assert others[0] != ["m1"]
    assert engine.asked <= 4  # a list and the counts, twice


class Presets:
    """Stands in for the checks of presets, which take their time."""

    def __init__(self) -> None:
        self.version = 1
        self.checked = 0

    async def config(self) -> SteeringConfig:
        return SteeringConfig(version=self.version)

    def check(self, config: SteeringConfig) -> list[Json]:
        self.checked += 1
        time.sleep(0.05)
        if self.checked == 3:
            raise MemoryError
        return [{"name": f"p{config.version}"}]


def test_presets_are_checked_once_for_all_who_ask(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    presets, service = Presets(), service_of(CountingEngine())
    monkeypatch.setattr(service, "config", presets.config)
    monkeypatch.setattr(service_module, "_checked_presets", presets.check)

    async def look(count: int) -> list[Any]:
        asked = (service.list_presets() for _ in range(count))
        return await asyncio.gather(*asked, return_exceptions=True)

    async def changes() -> None:
        first = await look(20)
        assert all(one["presets"] == [{"name": "p1"}] for one in first)
        assert await look(1) == first[:1]
        assert presets.checked == 1
        presets.version = 2
        assert (await look(2))[1]["presets"] == [{"name": "p2"}]
        presets.version = 3
        assert all(isinstance(one, MemoryError) for one in await look(2))
        assert (await look(1))[0]["presets"] == [{"name": "p3"}]
        assert presets.checked == 4

    asyncio.run(changes())


class SlowIndex(LabelIndex):
    """Notes how many threads search at once."""

    def __init__(self) -> None:
        super().__init__({3: "sea"})
        self.now = self.most = 0

    def search(self, query: str, limit: int) -> list[tuple[int, str]]:
        self.now += 1
        self.most = max(self.most, self.now)
        time.sleep(0.01)
        self.now -= 1
        return super().search(query, limit)


def test_labels_are_searched_by_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    index, service = SlowIndex(), service_of(CountingEngine())

    async def path_of(name: str, features: object = ()) -> str:
        return "/x"

    monkeypatch.setattr(service, "path_of", path_of)
    monkeypatch.setattr(service_module, "_labels_of", lambda path: index)

    async def search() -> list[Any]:
        asked = (service.search_labels("m", "sea", None, 9) for _ in range(20))
        return await asyncio.gather(*asked)

    assert asyncio.run(search()) == [[(3, "sea")]] * 20
    assert index.most == 1


def test_after_a_failure_the_engine_is_asked_again() -> None:
    engine = CountingEngine()
    service = service_of(engine)

    async def look() -> list[str]:
        engine.fails = True
        with pytest.raises(RuntimeError, match="gone"):
            await service.list()
        engine.fails = False
        return await names(service)

    assert asyncio.run(look()) == ["m2"]


def test_a_client_that_leaves_does_not_take_the_reply_from_others() -> None:
    service = service_of(CountingEngine())

    async def look() -> list[str]:
        leaving = asyncio.create_task(names(service))
        staying = asyncio.create_task(names(service))
        await asyncio.sleep(0)
        leaving.cancel()
        return await staying

    assert asyncio.run(look()) == ["m1"]


def request_that(*messages: dict[str, Any]) -> Request:
    """A request of a client that sends these messages and then waits."""
    left = list(messages)

    async def receive() -> dict[str, Any]:
        if left:
            await asyncio.sleep(0.05)
            return left.pop(0)
        await asyncio.sleep(60)
        return {}

    return Request({"type": "http", "method": "POST", "headers": []}, receive)


def test_work_for_a_client_that_left_is_cancelled() -> None:
    ended: list[str] = []

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("cancelled")

    async def leave() -> None:
        caller = request_that({"type": "http.disconnect"})
        with pytest.raises(RequestRefused, match="disconnected") as caught:
            await while_connected(caller, work())
        assert caught.value.status == 408
        await asyncio.sleep(0)
        assert ended == ["cancelled"]

    asyncio.run(leave())


def test_what_is_done_in_time_is_the_answer() -> None:
    async def work() -> str:
        return "done"

    assert asyncio.run(while_connected(request_that(), work())) == "done"


def test_a_body_that_is_not_finished_is_no_error_of_the_server() -> None:
    half = {"type": "http.request", "body": b'{"a', "more_body": True}
    caller = request_that(half, {"type": "http.disconnect"})
    with pytest.raises(RequestRefused, match="disconnected"):
        asyncio.run(read_body(caller))


@pytest.mark.parametrize(
    ("sent", "holds"),
    [
        ("Bearer schlüssel", True),
        ("bearer  schlüssel ", True),
        ("Bearer schlussel", False),
        ("Basic schlüssel", False),
        ("Bearer", False),
        ("", False),
    ],
)
def test_a_key_may_have_any_letters(sent: str, holds: bool) -> None:
    # As a server reads the bytes of a header.
    header = sent.encode().decode("latin-1")
    assert holds_key({"authorization": header}, "schlüssel") is holds
    assert not holds_key({"authorization": header}, None)


class DrainingEngine(CountingEngine):
    """Says that a request uses the module, however often it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.actions: list[str] = []

    async def collective_rpc(
        self,
        method: str,
        timeout: float | None = None,
        args: tuple = (),
        kwargs: dict | None = None,
    ) -> list[Any]:
        self.actions.append(args[0])
        ended = args[0] == "release"
        return [{"outcome": "done"} if ended else {"outcome": "draining", "in_use": 1}]


@pytest.mark.parametrize(("leaves", "status"), [(True, 408), (False, 409)])
def test_a_drain_that_is_given_up_opens_the_module_at_once(
    monkeypatch: pytest.MonkeyPatch, leaves: bool, status: int
) -> None:
    """And not only when the engine would be asked again."""
    monkeypatch.setattr(service_module, "POLL_S", 60.0)
    monkeypatch.setattr(service_module, "DRAIN_LIMIT_S", 600.0 if leaves else -1.0)
    engine = DrainingEngine()

    async def run() -> None:
        left = asyncio.Event()

        async def leaving() -> None:
            await left.wait()

        service = SteeringModulesService(cast(Engine, engine))
        drain = asyncio.create_task(service.unregister("hot", True, leaving))
        while not engine.actions:
            await asyncio.sleep(0)
        if leaves:
            left.set()
        with pytest.raises(RequestRefused) as refused:
            await asyncio.wait_for(drain, 5)
        assert refused.value.status == status
        assert engine.actions == ["unregister", "release"]

    asyncio.run(run())
