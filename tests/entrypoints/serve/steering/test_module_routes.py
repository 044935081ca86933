# SPDX-License-Identifier: Apache-2.0
"""`/v1/steering/modules`: what an operator asks for, and what is refused."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import example, given, settings
from hypothesis import strategies as st
from steering_testing.engine import FULL, generate, params, sae_spec
from steering_testing.requests import prompt

from tests.entrypoints.serve.steering.conftest import KEY, URL, Serve
from vllm import LLM
from vllm.config.steering_replies import (
    KNOWN_VERSION,
    METHOD,
    ModuleReply,
    as_reply,
)

pytestmark = pytest.mark.engine


def worker(llm: LLM) -> Any:
    core = llm.llm_engine.engine_core.engine_core
    return core.model_executor.driver_worker.worker


def names(client: TestClient) -> list[str]:
    return [module["name"] for module in client.get(URL).json()["modules"]]


@pytest.fixture(autouse=True)
def only_the_first_module_is_left(client: TestClient) -> Iterator[None]:
    yield
    for name in names(client):
        if name != "first":
            assert client.delete(f"{URL}/{name}").status_code == 200


def register(client: TestClient, root: Path, **changes: Any) -> Any:
    body = {"name": "hot", "path": str(root / "good"), **changes}
    return client.post(URL, json={k: v for k, v in body.items() if v is not ...})


def error(response: Any) -> dict[str, Any]:
    return response.json()["error"]


def test_a_module_is_registered_listed_used_and_removed(
    client: TestClient, root: Path, llm: LLM
) -> None:
    made = register(client, root, feature_units="unit_decoder", skip_token_ids=[7])
    assert made.status_code == 201, made.text
    assert made.json()["module"]["skip_token_ids"] == [7]
    before = client.get(URL).json()["module_tokens"]
    ask = params(2, **{FULL: [sae_spec("hot")]})
    assert len(generate(llm, [[7, 5, 7, 9, 11]], [ask])[0].tokens) == 2
    listed = client.get(URL).json()
    (hot,) = [module for module in listed["modules"] if module["name"] == "hot"]
    assert hot["digest"] == made.json()["module"]["digest"]
    for described in (hot, made.json()["module"]):
        (site,) = described["sites"]
        assert site["name"] == f"{site['hook']}.{site['layer']}"
    assert hot["weight_bytes"] == 2 * 96 * 64 * 4 + 8 * 96 + 4 * 64
    assert listed["free_slots"] == []
    assert listed["steered_tokens"]["full"]["prefill"] >= 5
    after = listed["module_tokens"]
    assert after["first"] == before["first"]
    was, now = before["hot"], after["hot"]
    for phase, tokens in (("prefill", 5), ("decode", 1)):
        full = (one["steered"]["full"][phase] for one in (was, now))
        assert -next(full) + next(full) == tokens
    assert now["steered"]["delta"] == was["steered"]["delta"]
    # Token 7 twice in the prompt.
    assert now["bypassed"] - was["bypassed"] == 2
    assert now["saturated"] == was["saturated"] == 0
    assert client.delete(f"{URL}/hot").status_code == 200
    assert names(client) == ["first"]


def test_a_reply_repeats_no_configuration_that_its_caller_has(llm: LLM) -> None:
    def reply(**payload: Any) -> ModuleReply:
        return as_reply(llm.collective_rpc(METHOD, args=("list", payload))[0])

    config = reply().config
    assert config is not None
    version = config["version"]
    assert reply(**{KNOWN_VERSION: version}).config is None
    for other in (version - 1, version + 1, None):
        assert reply(**{KNOWN_VERSION: other}).config == config


def test_replacing_is_asked_for(client: TestClient, root: Path) -> None:
    assert register(client, root).status_code == 201
    again = register(client, root, path=str(root / "other"))
    assert (again.status_code, error(again)["param"]) == (409, "name")
    assert (
        register(client, root, path=str(root / "other"), replace=True).status_code
        == 201
    )


def test_a_module_in_use_is_a_conflict_with_the_number(
    client: TestClient, root: Path, llm: LLM
) -> None:
    register(client, root)
    ask = params(4, **{FULL: [sae_spec("hot")]})
    llm.llm_engine.add_request("r", {"prompt_token_ids": prompt(1, 9)}, ask)
    refused = client.delete(f"{URL}/hot")
    assert (refused.status_code, error(refused)["in_use"]) == (409, 1)
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()


def test_draining_answers_when_the_last_request_is_done(
    client: TestClient, root: Path, llm: LLM
) -> None:
    register(client, root)
    ask = params(4, **{FULL: [sae_spec("hot")]})
    llm.llm_engine.add_request("r", {"prompt_token_ids": prompt(1, 9)}, ask)
    answers: list[int] = []
    thread = threading.Thread(
        target=lambda: answers.append(
            client.delete(f"{URL}/hot?drain=true").status_code
        )
    )
    thread.start()
    time.sleep(0.5)
    assert answers == []
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    thread.join(20)
    assert answers == [200]
    assert names(client) == ["first"]


def test_a_module_without_room_names_the_slot(client: TestClient, root: Path) -> None:
    refused = register(client, root, path=str(root / "wide"))
    assert refused.status_code == 409
    assert '"width": 200' in error(refused)["message"]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"name": ...}, "name"),
        ({"name": ""}, "name"),
        ({"name": "a/b"}, "name"),
        ({"name": 3}, "name"),
        ({"path": ...}, "path"),
        ({"path": "relative"}, "path"),
        ({"path": "a\x00b"}, "path"),
        ({"replace": 1}, "replace"),
        ({"drain": "yes"}, "drain"),
        ({"feature_units": "metres"}, "feature_units"),
        ({"skip_token_ids": [True]}, "skip_token_ids"),
        ({"skip_token_ids": [2**70]}, "skip_token_ids"),
        ({"norm_guard": 0}, "norm_guard"),
        ({"norm_guard": 10**400}, "norm_guard"),
        ({"reference_norm": "large"}, "reference_norm"),
        ({"sites": "post_block.1"}, "sites"),
        ({"sharding": "all"}, "sharding"),
        ({"weights": "x"}, "weights"),
    ],
)
def test_a_bad_field_is_named(
    client: TestClient, root: Path, changes: dict[str, Any], field: str
) -> None:
    refused = register(client, root, **changes)
    assert (refused.status_code, error(refused)["param"]) == (400, field)


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{", b"null", b"[" * 100_000, b'{"a":' * 20_000, b"\xff\xfe"]
)
def test_a_body_that_is_no_object_is_refused(client: TestClient, body: bytes) -> None:
    assert client.post(URL, content=body).status_code == 400


def test_a_huge_body_is_refused(client: TestClient) -> None:
    assert client.post(URL, content=b" " * (1 << 20)).status_code == 413


def test_a_file_with_a_nan_leaves_nothing_behind(
    client: TestClient, root: Path, llm: LLM
) -> None:
    refused = register(client, root, path=str(root / "nan"))
    assert refused.status_code == 400
    assert "nothing was changed" in error(refused)["message"]
    assert names(client) == ["first"]
    assert len(client.get(URL).json()["free_slots"]) == 1


@pytest.mark.parametrize("outside", ["/etc/passwd", "hf:owner/repo", "{root}-other"])
def test_a_path_outside_the_roots_is_refused(
    client: TestClient, root: Path, outside: str
) -> None:
    refused = register(client, root, path=outside.format(root=root))
    assert (refused.status_code, error(refused)["param"]) == (403, "path")
    assert f"expected a path under one of '{root}'" in error(refused)["message"]


def test_an_option_that_the_files_do_not_fit_is_named(
    client: TestClient, root: Path
) -> None:
    for options, field in (
        ({"norm_guard": 3.0}, "norm_guard"),
        ({"sites": ["post_block.0", "post_block.1"]}, "sites"),
    ):
        refused = register(client, root, **options)
        assert (refused.status_code, error(refused)["param"]) == (400, field)
        assert error(refused)["message"].startswith(f"{field}: ")


def test_a_path_that_climbs_is_refused(client: TestClient, root: Path) -> None:
    refused = register(client, root, path=f"{root}/good/../good")
    assert (refused.status_code, error(refused)["param"]) == (400, "path")


@pytest.mark.parametrize("whole", [True, False])
def test_a_link_that_leaves_the_roots_is_refused(
    client: TestClient, root: Path, tmp_path: Path, whole: bool
) -> None:
    secret = tmp_path / "sae"
    secret.mkdir()
    for file in (root / "good").iterdir():
        (secret / file.name).write_bytes(file.read_bytes())
    link = root / f"link-{whole}"
    if whole:
        link.symlink_to(secret)
    else:
        link.mkdir()
        for file in secret.iterdir():
            (link / file.name).symlink_to(file)
    refused = register(client, root, path=str(link))
    assert (refused.status_code, error(refused)["param"]) == (403, "path")


@pytest.mark.parametrize("sends", [None, "wrong", "", KEY + "x"])
def test_without_the_key_modules_are_shown_but_no_path_and_no_change(
    serve: Serve, root: Path, sends: str | None
) -> None:
    with serve(sends=sends) as stranger:
        for shown in (stranger.get(URL), stranger.get(f"{URL}/first")):
            assert shown.status_code == 200
            assert '"name":"first"' in shown.text
            assert str(root) not in shown.text
        assert register(stranger, root).status_code == 401
        assert stranger.delete(f"{URL}/first").status_code == 401


def test_one_module_is_shown_as_in_the_list(client: TestClient, root: Path) -> None:
    (listed,) = client.get(URL).json()["modules"]
    assert client.get(f"{URL}/first").json() == {"module": listed}
    assert listed["path"] == str(root / "other")
    nobody = client.get(f"{URL}/nobody")
    assert (nobody.status_code, error(nobody)["param"]) == (404, "name")
    assert client.get(f"{URL}/no%20body").status_code == 400


def test_where_links_lead_is_not_for_clients(client: TestClient, root: Path) -> None:
    (root / "really-here").mkdir()
    (root / "really-here" / "private-name.txt").write_text("")
    (root / "link").symlink_to(root / "really-here")
    refused = register(client, root, path=str(root / "link"))
    assert refused.status_code == 400
    assert str(root / "link") in error(refused)["message"]
    assert "really-here" not in refused.text
    assert "private-name" not in refused.text


def test_the_key_has_a_header_of_its_own(serve: Serve) -> None:
    with serve(sends="the server's other key") as client:
        found = client.get(URL, headers={"X-Steering-Authorization": f"Bearer {KEY}"})
        assert found.status_code == 200


def test_a_server_without_a_key_changes_nothing(serve: Serve, root: Path) -> None:
    with serve(key=None) as client:
        assert client.get(URL).status_code == 200
        assert register(client, root).status_code == 403
        assert client.delete(f"{URL}/first").status_code == 403


def test_the_key_comes_from_the_environment_too(
    serve: Serve, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_STEERING_API_KEY", "from-the-environment")
    with serve(key=None, sends="from-the-environment") as client:
        assert client.delete(f"{URL}/nobody").status_code == 404


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
FIELD = st.sampled_from(
    ["name", "path", "feature_units", "skip_token_ids", "norm_guard", "sites",
     "reference_norm", "sharding", "replace", "drain", "x"]
)  # fmt: skip


@settings(max_examples=150)
@example(changes={"reference_norm": 3.402823466385289e38, "norm_guard": 1}, name="")
@example(changes={"reference_norm": 1e30, "norm_guard": 1e30}, name="")
@example(changes={"reference_norm": 10**400, "norm_guard": 10**400}, name="")
@given(changes=st.dictionaries(FIELD, JSON, max_size=4), name=st.text(max_size=12))
def test_no_body_makes_a_server_error(
    client: TestClient, root: Path, llm: LLM, changes: dict[str, Any], name: str
) -> None:
    sae = str(root / ("nan" if "x" in name else "good"))
    body = json.dumps({"name": "fuzz", "path": sae, **changes})
    answer = client.post(URL, content=body.encode(errors="surrogatepass"))
    assert answer.status_code < 500, answer.text
    if answer.status_code == 201:
        made = answer.json()["module"]["name"]
        assert client.delete(f"{URL}/{made}").status_code == 200
    assert names(client) == ["first"]
    assert worker(llm).steering_module_changes.staged is None


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (b'{"name": "a", "path": "/x", "name": "b"}', "name: is given twice"),
        (b'{"name": "a", "path": "/x", "skip_token_ids": [-0]}', "-0"),
        (b'{"name": "a", "path": "/x", "skip_token_ids": 3}', "found 3"),
    ],
)
def test_a_body_with_two_meanings_is_refused(
    client: TestClient, body: bytes, found: str
) -> None:
    refused = client.post(URL, content=body)
    assert refused.status_code == 400
    assert found in error(refused)["message"]


def test_the_schema_is_the_definition(client: TestClient) -> None:
    operation = client.get("/openapi.json").json()["paths"][URL]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    assert schema["required"] == ["name", "path"]
    assert schema["properties"]["replace"] == {"type": "boolean", "default": False}


def test_the_document_names_queries_and_statuses(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    named = {
        (path, verb): {parameter["name"] for parameter in operation["parameters"]}
        for path, verbs in paths.items()
        for verb, operation in verbs.items()
        if "parameters" in operation
    }
    assert named[f"{URL}/{{name}}/features", "get"] == {"name", "q", "index", "limit"}
    assert named[f"{URL}/{{name}}/evidence", "get"] == {"name", "index", "site"}
    assert named[f"{URL}/{{name}}", "delete"] == {"name", "drain"}
    assert "201" in paths[URL]["post"]["responses"]
    for path, verbs in paths.items():
        for verb, operation in verbs.items():
            assert operation["description"], path
            if verb != "get" and "encode" not in path:
                assert {"401", "403"} <= operation["responses"].keys(), path
