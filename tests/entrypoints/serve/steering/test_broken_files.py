# SPDX-License-Identifier: Apache-2.0
"""Something else stands where a module's file is expected, or it goes meanwhile."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from httpx import Response

from vllm.entrypoints.serve.steering.service import SteeringModulesService

pytestmark = pytest.mark.engine

URL = "/v1/steering/modules"
MANIFEST, WEIGHTS = "manifest.json", "post_block.1.safetensors"
Change = Callable[[Path], None]


def loop(place: Path) -> None:
    place.symlink_to(place.name)


def truncated(place: Path) -> None:
    os.truncate(place, place.stat().st_size // 2)


@pytest.fixture
def folder(root: Path) -> Path:
    """A good module that a test may break."""
    made = root / "broken"
    shutil.rmtree(made, ignore_errors=True)
    shutil.copytree(root / "good", made)
    return made


def check_refused(client: TestClient, answer: Response, named: str) -> None:
    """The answer names the file, and the registry is as before."""
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "path"), answer.text
    assert named in error["message"]
    listed = client.get(URL).json()
    assert [module["name"] for module in listed["modules"]] == ["first"]
    assert len(listed["free_slots"]) == 1


@pytest.mark.parametrize("name", [MANIFEST, WEIGHTS])
@pytest.mark.parametrize(
    ("put", "found"),
    [
        (os.mkfifo, "found a pipe, a socket or a device, expected a regular file"),
        (Path.mkdir, "found a directory, expected a file"),
        (loop, "found a symbolic link that leads nowhere, expected a file"),
    ],
)
def test_what_stands_where_a_file_is_expected_is_named(
    client: TestClient, folder: Path, name: str, put: Change, found: str
) -> None:
    (folder / name).unlink()
    put(folder / name)
    answer = client.post(URL, json={"name": "hot", "path": str(folder)})
    check_refused(client, answer, f"{name}: {found}")


@pytest.mark.parametrize("put", [os.mkfifo, Path.mkdir, loop])
def test_a_path_that_is_no_module_is_refused(
    client: TestClient, root: Path, put: Change
) -> None:
    place = root / "elsewhere"
    put(place)
    try:
        answer = client.post(URL, json={"name": "hot", "path": str(place)})
    finally:
        place.rmdir() if put is Path.mkdir else place.unlink()
    assert answer.status_code == (404 if put is loop else 400), answer.text
    assert answer.json()["error"]["message"].startswith("path: ")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda place: place.unlink(), f"{WEIGHTS}: missing"),
        (truncated, WEIGHTS),
        (lambda place: place.write_bytes(b"x" * 5000), WEIGHTS),
        (lambda place: shutil.rmtree(place.parent), "broken"),
    ],
    ids=["removed", "truncated", "overwritten", "no folder"],
)
def test_a_file_that_goes_between_its_hashing_and_its_loading_is_named(
    client: TestClient,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Change,
    named: str,
) -> None:
    drained = SteeringModulesService._drained

    async def later(self: SteeringModulesService, *args: object) -> object:
        change(folder / WEIGHTS)
        return await drained(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(SteeringModulesService, "_drained", later)
    answer = client.post(URL, json={"name": "hot", "path": str(folder)})
    check_refused(client, answer, named)
    assert "nothing was changed" in answer.text
    monkeypatch.undo()
    good = str(folder.parent / "good")
    assert client.post(URL, json={"name": "hot", "path": good}).status_code == 201
    assert client.delete(f"{URL}/hot").status_code == 200
