# SPDX-License-Identifier: Apache-2.0
"""The soak over HTTP: clients of a server that stream, disconnect and err."""

from __future__ import annotations

import json
import math
import random
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
from soak import pool as requests
from soak.alone import Pool, Rounding, answer_alone
from soak.choices import UNITS
from soak.http_answers import ASKED, answers_of_choices
from soak.pool import BAD, HOT, PASSING, VERSIONS, Answer, Item, drift
from soak.report import Report, say
from steering_testing import models
from steering_testing.engine import engine
from steering_testing.modules_http import KEY, MODULES
from steering_testing.mutations import mutated
from steering_testing.server import MODEL_NAME, Server, api_server

CLIENTS = 8
MODES = ("whole", "whole", "stream", "stream", "leave", "drop", "bad", "odd")
# How long what is left may take to go away.
SETTLE_S = 30.0
CHANGED = (200, 201, 404, 409)
LIMITS = Rounding(margin=5e-3, tolerance=1e-3, unit=UNITS["exact"], repeats=False)
# Several samples are drawn from the best token only.
SAMPLED = {"temperature": 0.8, "top_k": 1}
# Little memory and short steps: requests are preempted, and prompts come in chunks.
SQUEEZED = (
    *("--block-size", "32", "--num-gpu-blocks-override", "17"),
    *("--max-num-batched-tokens", "48", "--max-num-seqs", "12"),
)


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
        *SQUEEZED,
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
        **(SAMPLED if item.samples > 1 else {}),
        "n": item.samples,
        **ASKED,
        **item.extra,
        **more,
    }


class Clients:
    """Clients of one server, each a thread with a seeded random schedule.

    Args:
        url: of the server.
        pool: what to ask, with references. The items of the module that changes come
            in pairs, one for each of its versions.
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
        self.asked = asked_once(pool)
        self.versions = versions
        self.report = report
        self.seed = seed
        self._lock = threading.Lock()

    def run(self, seconds: float, count: int) -> None:
        """Ask each item alone, then all clients at once; then look for leaks."""
        start = time.monotonic()
        self.report.distinct = len(self.asked)
        with self._client() as client:
            for items in self.asked:
                if items[0].version is None:
                    self._compare(items, self._whole(client, items[0]))
        say(f"http: {self.report.requests} answers of a server at rest")
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
        # All claim to be the same request, which must not mix them up.
        headers = {"X-Request-Id": "same"}
        return httpx.Client(base_url=self.url, timeout=120, headers=headers)

    def _guarded(self, at: int, deadline: float, count: int) -> None:
        rng = random.Random(self.seed * 100 + at)
        act = self._change_something if at == CLIENTS else self._ask_something
        with self._client() as client:
            try:
                while time.monotonic() < deadline and self.report.requests < count:
                    act(client, rng)
            except Exception as error:
                self._note(f"client {at}: {error!r}")

    def _ask_something(self, client: httpx.Client, rng: random.Random) -> None:
        items = rng.choice(self.asked)
        item, mode = items[0], rng.choice(MODES)
        if mode == "bad":
            self._bad_request(client, rng.choice(BAD))
        elif mode == "odd":
            self._odd_request(client, rng, item)
        elif mode == "drop":
            self._drop(client, item)
        elif mode == "leave":
            self._stream(client, item, rng.randint(1, 3))
        else:
            ask = self._whole if mode == "whole" else self._stream
            self._compare(items, ask(client, item))

    def _whole(self, client: httpx.Client, item: Item) -> list[Answer] | None:
        """The answers to an item; None for a module that is not there just now."""
        response = client.post("/v1/completions", json=body_of(item))
        if response.status_code != 200:
            self._refused(item, response.status_code, response.text)
            return None
        return answers_of_choices(response.json()["choices"])

    def _stream(
        self, client: httpx.Client, item: Item, leaves_after: int | None = None
    ) -> list[Answer] | None:
        """The answers of a stream, or of its first chunks: then the client leaves."""
        said: list[dict[str, Any]] = []
        body = body_of(item, stream=True)
        with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                self._refused(item, response.status_code, response.read().decode())
                return None
            for chunk, line in enumerate(response.iter_lines()):
                if leaves_after is not None and chunk >= leaves_after:
                    self._count("disconnect in a stream")
                    break
                if line.startswith("data: {"):
                    content = json.loads(line.removeprefix("data: "))
                    if error := content.get("error"):
                        self._refused(item, error["code"], error["message"])
                        return None
                    said += content.get("choices") or ()
        return answers_of_choices(said)

    def _refused(self, item: Item, status: int, text: str) -> None:
        """Only the module that changes may be missing, and the error says so."""
        if item.version is not None and status in (400, 409) and HOT in text:
            self._count(f"no module: {status}")
        else:
            self._note(f"{item}: {status} {text[:300]}")

    def _drop(self, client: httpx.Client, item: Item) -> None:
        """Send a request and go away before there is an answer."""
        try:
            client.post("/v1/completions", json=body_of(item), timeout=0.02)
        except httpx.TimeoutException:
            self._count("disconnect before the answer")

    def _odd_request(
        self, client: httpx.Client, rng: random.Random, item: Item
    ) -> None:
        """A body that is changed in some places, or broken: any answer but a 5xx."""
        body = body_of(item, stream=rng.random() < 0.3)
        data = mutated(rng, body, "sae_", "steering", "n", "max_tokens", "logprobs")
        headers = {"Content-Type": "application/json"}
        answer = client.post("/v1/completions", content=data, headers=headers)
        self._count(f"odd body: {answer.status_code}")
        if answer.status_code >= 500 or "InternalServerError" in answer.text:
            self._note(f"{data[:2000]!r}: {answer.status_code} {answer.text[:300]}")

    def _bad_request(self, client: httpx.Client, extra: dict[str, Any]) -> None:
        item = Item("bad", [5, 6], 2, extra)
        # Python's NaN is not JSON; the server must say so, too.
        content = json.dumps(body_of(item))
        headers = {"Content-Type": "application/json"}
        answer = client.post("/v1/completions", content=content, headers=headers)
        self._count("bad request refused")
        if not 400 <= answer.status_code < 500:
            self._note(f"{extra}: {answer.status_code} {answer.text[:200]}")

    def _change_something(self, client: httpx.Client, rng: random.Random) -> None:
        """Register, replace or remove the module, or make or delete a preset."""
        drains = rng.random() < 0.5
        name, preset = PASSING
        at = f"/v1/steering/presets/{name}"
        kind = rng.choice(("module", "module", "module", "module", "put", "delete"))
        if kind == "put":
            answer = client.put(at, json=preset, headers=KEY)
        elif kind == "delete":
            answer = client.delete(at, headers=KEY)
        elif rng.random() < 0.3:
            query = "?drain=true" if drains else ""
            answer = client.delete(f"{MODULES}/{HOT}{query}", headers=KEY)
        else:
            path = self.versions[rng.choice(list(self.versions))]
            body = {"name": HOT, "path": path, "replace": True, "drain": drains}
            answer = client.post(MODULES, json=body, headers=KEY)
        what = "module" if kind == "module" else "preset"
        self._count(f"{what} change: {answer.status_code}")
        if answer.status_code not in CHANGED:
            self._note(f"{what} change: {answer.status_code} {answer.text[:200]}")
        time.sleep(0.2)

    def _compare(self, items: list[Item], found: list[Answer] | None) -> None:
        """The answers must be those of the item alone, under some version."""
        if found is None:
            return
        off, said = min(
            ((drift_of(found, item.reference), item.reference) for item in items),
            key=lambda pair: pair[0],
        )
        with self._lock:
            report = self.report
            report.finished[items[0].kind] += 1
            report.tokens += sum(len(answer.tokens) for answer in found)
            if off <= LIMITS.tolerance:
                report.largest_drift = max(report.largest_drift, off)
                return
            same = [a.tokens for a in found] == [a.tokens for a in said]
            report.wrong_scores += same
            report.wrong_tokens += not same
            report.example(f"off by {off}: {items[0]}: {found}")

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
                self._whole(client, Item("last", [5, 6], 2, {}))
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
    chat template; that is not counted. Neither is what it logs of a stream that is
    refused because its module has just changed.
    """
    lines = log.read_text(errors="replace").splitlines()
    starts = [at for at, line in enumerate(lines) if "Traceback" in line]
    return [
        " | ".join(lines[at : at + 12])
        for at, end in pairwise([*starts, len(lines)])
        if " WARNING " not in lines[at]
        and not any("ModuleChangedError: " in line for line in lines[at:end])
    ]


def asked_once(pool: list[Item]) -> list[list[Item]]:
    """The distinct requests of a pool, each with an item for every version.

    Whoever names the module that changes gets the version of the moment. So a request
    that has no clear answer under one of them is left out.
    """
    groups: dict[str, list[Item]] = defaultdict(list)
    for item in pool:
        groups[json.dumps([item.prompt, item.max_tokens, item.extra])].append(item)
    return [
        items
        for items in groups.values()
        if items[0].version is None or len(items) == len(VERSIONS)
    ]


def drift_of(found: list[Answer], alone: list[Answer]) -> float:
    """As `drift`, of all samples."""
    if len(found) != len(alone):
        return math.inf
    return max(drift(*pair) for pair in zip(found, alone, strict=True))


def references(
    model_root: Path, root: Path, versions: dict[str, str], seed: int, distinct: int
) -> Pool:
    """Requests, and what they say alone on an engine of this process."""
    steering = {"presets": requests.PRESETS, **requests.OPTIONS}
    pool = requests.make_pool(distinct, seed)
    other = dict(zip(VERSIONS, reversed(VERSIONS), strict=True))
    pool += [
        replace(item, version=other[item.version], reference=[])
        for item in pool
        if item.version is not None
    ]
    with engine("llama", model_root, requests.save(root), steering) as llm:
        return answer_alone(llm, pool, versions, LIMITS)


def run(
    root: Path,
    model_root: Path,
    seed: int,
    seconds: float,
    count: int,
    distinct: int,
    *arguments: str,
) -> Report:
    """One server with these arguments, and its clients."""
    root.mkdir(exist_ok=True)
    versions = requests.save_versions(root)
    stable = references(model_root, root, versions, seed, distinct)
    report = Report("http", left_out=stable.left_out, shortened=stable.shortened)
    with server(model_root, root, *arguments) as running:
        clients = Clients(running.url, stable.items, versions, report, seed)
        clients.run(seconds, count)
        report.exceptions += tracebacks(running.log)
    say("\n".join(report.lines()))
    return report
