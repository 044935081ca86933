# SPDX-License-Identifier: Apache-2.0
"""The soak over HTTP: clients of a server that stream, disconnect and err."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from soak import pool as requests
from soak.pool import BAD, HOT, Item
from soak.report import Report, say
from steering_testing import models
from steering_testing.modules_http import KEY, MODULES
from steering_testing.server import MODEL_NAME, Server, api_server

CLIENTS = 8
MODES = ("whole", "whole", "stream", "stream", "leave", "drop", "bad")
# How long what is left may take to go away.
SETTLE_S = 30.0
CHANGED = (200, 201, 404, 409)


@contextmanager
def server(model_root: Path, root: Path, *arguments: str) -> Iterator[Server]:
    """A server with the modules and presets of the pool."""
    steering = {
        "modules": requests.save(root),
        "presets": requests.PRESETS,
        **requests.OPTIONS,
        "module_roots": [str(root)],
    }
    options = [
        "--skip-tokenizer-init",
        "--steering-api-key", "the-key",
        "--additional-config", json.dumps({"steering": steering}),
    ]  # fmt: skip
    model = models.save("llama", model_root)
    environment = {"VLLM_PLUGINS": "steering"}
    log = root / "log"
    with api_server(
        model, log, *options, *arguments, environment=environment
    ) as running:
        yield running


def body_of(item: Item, **more: Any) -> dict[str, Any]:
    """The item as a request for a completion."""
    return {
        "model": MODEL_NAME,
        "prompt": item.prompt,
        "max_tokens": item.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "detokenize": False,
        "return_token_ids": True,
        **item.extra,
        **more,
    }


class Clients:
    """Clients of one server, each a thread with a seeded random schedule.

    Args:
        url: of the server.
        pool: what to ask; items of changing modules are left out.
        versions: paths of the module that changes, by version.
        report: is filled.
    """

    def __init__(
        self,
        url: str,
        pool: list[Item],
        versions: dict[str, str],
        report: Report,
        seed: int,
    ):
        self.url = url
        self.pool = [item for item in pool if item.version is None and item.samples < 2]
        self.versions = versions
        self.report = report
        self.seed = seed
        self.alone: list[list[int]] = []
        self._lock = threading.Lock()

    def run(self, seconds: float, count: int) -> None:
        """Ask each item alone, then all clients at once; then look for leaks."""
        start = time.monotonic()
        with self._client() as client:
            self.alone = [self._answer(client, item) for item in self.pool]
        say(f"http: {len(self.alone)} references")
        self.report.distinct = len(self.alone)
        deadline = time.monotonic() + seconds
        threads = [
            threading.Thread(target=self._guarded, args=(at, deadline, count))
            for at in range(CLIENTS + 1)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self._check_leaks()
        self.report.seconds = time.monotonic() - start

    def _client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=120)

    def _guarded(self, at: int, deadline: float, count: int) -> None:
        rng = random.Random(self.seed * 100 + at)
        act = self._change_module if at == CLIENTS else self._ask_something
        with self._client() as client:
            try:
                while time.monotonic() < deadline and self.report.requests < count:
                    act(client, rng)
            except Exception as error:
                self._note(f"client {at}: {error!r}")

    def _ask_something(self, client: httpx.Client, rng: random.Random) -> None:
        at = rng.randrange(len(self.pool))
        mode = rng.choice(
            ["whole", "whole", "stream", "stream", "leave", "drop", "bad"]
        )
        item = self.pool[at]
        if mode == "bad":
            self._bad_request(client, rng.choice(BAD))
        elif mode == "drop":
            self._drop(client, item)
        elif mode == "whole":
            self._compare(at, self._answer(client, item))
        else:
            leaves_after = rng.randint(1, 3) if mode == "leave" else None
            found = self._stream(client, item, leaves_after)
            if leaves_after is None:
                self._compare(at, found)

    def _answer(self, client: httpx.Client, item: Item) -> list[int]:
        response = client.post("/v1/completions", json=body_of(item))
        if response.status_code != 200:
            self._note(f"{item}: {response.status_code} {response.text[:200]}")
            return []
        return list(response.json()["choices"][0]["token_ids"])

    def _stream(
        self, client: httpx.Client, item: Item, leaves_after: int | None
    ) -> list[int]:
        """The tokens of a stream, or of its first chunks: then the client leaves."""
        found: list[int] = []
        body = body_of(item, stream=True)
        with client.stream("POST", "/v1/completions", json=body) as response:
            for chunk, line in enumerate(response.iter_lines()):
                if leaves_after is not None and chunk >= leaves_after:
                    self._count("disconnect in a stream")
                    break
                if line.startswith("data: {"):
                    choices = json.loads(line.removeprefix("data: ")).get("choices")
                    for choice in choices or ():
                        found += choice.get("token_ids") or ()
        return found

    def _drop(self, client: httpx.Client, item: Item) -> None:
        """Send a request and go away before there is an answer."""
        try:
            client.post("/v1/completions", json=body_of(item), timeout=0.02)
        except httpx.TimeoutException:
            self._count("disconnect before the answer")

    def _bad_request(self, client: httpx.Client, extra: dict[str, Any]) -> None:
        item = Item("bad", [5, 6], 2, extra)
        # Python's NaN is not JSON; the server must say so, too.
        content = json.dumps(body_of(item))
        headers = {"Content-Type": "application/json"}
        answer = client.post("/v1/completions", content=content, headers=headers)
        self._count("bad request refused")
        if not 400 <= answer.status_code < 500:
            self._note(f"{extra}: {answer.status_code} {answer.text[:200]}")

    def _change_module(self, client: httpx.Client, rng: random.Random) -> None:
        if rng.random() < 0.3:
            answer = client.delete(f"{MODULES}/{HOT}", headers=KEY)
        else:
            path = self.versions[rng.choice(list(self.versions))]
            body = {"name": HOT, "path": path, "replace": True}
            answer = client.post(MODULES, json=body, headers=KEY)
        self._count(f"module change: {answer.status_code}")
        if answer.status_code not in CHANGED:
            self._note(f"module change: {answer.status_code} {answer.text[:200]}")
        time.sleep(0.2)

    def _compare(self, at: int, found: list[int]) -> None:
        with self._lock:
            self.report.finished[self.pool[at].kind] += 1
            self.report.tokens += len(found)
            if found != self.alone[at]:
                self.report.wrong_tokens += 1
                self.report.example(f"{self.pool[at]}: {found} not {self.alone[at]}")

    def _count(self, fault: str) -> None:
        with self._lock:
            self.report.faults[fault] += 1

    def _note(self, text: str) -> None:
        with self._lock:
            self.report.exceptions.append(text)

    def _check_leaks(self) -> None:
        """Requests of clients that went away end, and give their rows back."""
        deadline = time.monotonic() + SETTLE_S
        with self._client() as client:
            while True:
                # Rows go back with the next step.
                self._answer(client, Item("last", [5, 6], 2, {}))
                listed = client.get(MODULES, headers=KEY).json()
                rows = sum(listed["rows_in_use"].values())
                held = sum(module["requests"] for module in listed["modules"])
                if not rows and not held:
                    return
                if time.monotonic() > deadline:
                    break
                time.sleep(0.5)
        self.report.leaks.append(f"{rows} rows, {held} requests that name a module")


def tracebacks(log: Path) -> list[str]:
    """What a server's log shows of exceptions.

    vLLM warns at start-up, with a traceback, that a model without a tokenizer has no
    chat template; that is not counted.
    """
    lines = log.read_text(errors="replace").splitlines()
    return [
        " | ".join(lines[at : at + 12])
        for at, line in enumerate(lines)
        if "Traceback" in line and " WARNING " not in line
    ]


def run(
    root: Path, model_root: Path, seed: int, seconds: float, count: int, distinct: int
) -> Report:
    """One server and its clients."""
    root.mkdir(exist_ok=True)
    report = Report("http")
    pool = requests.make_pool(distinct, seed)
    versions = requests.save_versions(root)
    with server(model_root, root) as running:
        Clients(running.url, pool, versions, report, seed).run(seconds, count)
        report.exceptions += tracebacks(running.log)
    say("\n".join(report.lines()))
    return report
