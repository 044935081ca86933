# SPDX-License-Identifier: Apache-2.0
"""The page at `/steering/` and the route that tells it about features."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from vllm.config.sae_labels import EVIDENCE_NAME
from vllm.entrypoints.serve.steering import SteeringEndpoints
from vllm.entrypoints.serve.steering.access import RequestRefused
from vllm.entrypoints.serve.steering.evidence import of_features, parse_indices
from vllm.entrypoints.serve.steering.playground import FOLDER

MODULES = "/v1/steering/modules"
CONTENT = {
    "card": {"fvu": 0.25},
    "max": [1.5, 2.5],
    "contexts": {"1": [["a ", "b", " c"]]},
    "neuronpedia": "model/site",
}


def files() -> list[Path]:
    return sorted(FOLDER.iterdir())


@pytest.fixture
def page() -> TestClient:
    app = FastAPI()
    SteeringEndpoints().attach_router(app)
    return TestClient(app)


def test_evidence_of_a_module_with_several_sites(tmp_path: Path) -> None:
    own = {"l0": 4, "max": [1.0, 2.0], "contexts": {"1": [["a", "b", "c"]]}}
    other = {"fvu": 0.1, "max": [3.0, 4.0]}
    content = {"sites": {"post_block.1": own, "post_block.2": other}}
    (tmp_path / "evidence.json").write_text(json.dumps(content))
    found = of_features(str(tmp_path), [1], "post_block.1")
    assert found["features"] == {"1": {"max": 2.0, "contexts": [["a", "b", "c"]]}}
    assert found["sites"] == {"post_block.1": {"l0": 4}, "post_block.2": {"fvu": 0.1}}
    found = of_features(str(tmp_path), [0, 1], "post_block.2")
    assert found["features"] == {"0": {"max": 3.0}, "1": {"max": 4.0}}
    assert of_features(str(tmp_path), [1], "post_block.3")["features"] == {"1": {}}


def test_every_file_of_the_page_is_served_without_a_key(page: TestClient) -> None:
    for path in files():
        answer = page.get(f"/steering/{path.name}")
        assert answer.status_code == 200
        assert answer.content == path.read_bytes()
    assert page.get("/steering").text == (FOLDER / "index.html").read_text()


@pytest.mark.parametrize("sent", ["", "/proxy"])
def test_the_page_is_found_behind_a_proxy_whether_it_removes_its_prefix_or_not(
    sent: str,
) -> None:
    """`sent` is what is left of the prefix when a request arrives."""
    app = FastAPI()
    app.root_path = "/proxy"  # as vLLM does for --root-path
    SteeringEndpoints().attach_router(app)
    page = TestClient(app)
    for path in files():
        answer = page.get(f"{sent}/steering/{path.name}")
        assert answer.content == path.read_bytes()
    assert page.get(f"{sent}/steering/").text == (FOLDER / "index.html").read_text()
    assert page.get(f"{sent}/steering/../api.py").status_code == 404
    answer = page.get(f"{sent}/steering", follow_redirects=False)
    assert answer.status_code == 307
    # Relative, so that the browser keeps the prefix that it has.
    assert answer.headers["location"] == "./steering/"


def test_the_page_may_load_nothing_from_other_hosts(page: TestClient) -> None:
    policy = page.get("/steering/").headers["content-security-policy"]
    assert policy.startswith("default-src 'self'; ")
    for path in files():
        links = set(re.findall(r"https?://[\w.]+", path.read_text()))
        # A name space, and a link that the reader may follow.
        assert links <= {"http://www.w3.org", "https://www.neuronpedia.org"}, path


def test_every_id_that_a_script_asks_for_is_in_the_page() -> None:
    html = (FOLDER / "index.html").read_text()
    ids = set(re.findall(r'\bid="([\w-]+)"', html))
    for path in FOLDER.glob("*.js"):
        asked = re.findall(r'\$\("([\w-]+)"\)', path.read_text())
        assert set(asked) <= ids, path
    labels = set(re.findall(r'\bfor="([\w-]+)"', html))
    assert labels <= ids


def test_every_import_of_a_script_is_a_file_that_exports_the_name() -> None:
    pattern = r'import \{([^}]+)\} from "\./([\w.]+)";'
    for path in FOLDER.glob("*.js"):
        for names, file in re.findall(pattern, path.read_text()):
            exported = (FOLDER / file).read_text()
            for name in names.replace("\n", " ").split(","):
                if name := name.strip():
                    assert re.search(
                        rf"export [\w*\s]+[ ]{re.escape(name)}\W", exported
                    ), name


def test_the_text_of_a_server_is_never_parsed_as_html() -> None:
    for path in FOLDER.glob("*.js"):
        assert not re.search(r"innerHTML|insertAdjacentHTML|eval\(", path.read_text())


@pytest.mark.parametrize("path", ["..%2fapi_router.py", "../access.py", "nothing.js"])
def test_nothing_outside_the_folder_is_served(page: TestClient, path: str) -> None:
    assert page.get(f"/steering/{path}").status_code == 404


def test_evidence_of_features(tmp_path: Path) -> None:
    (tmp_path / EVIDENCE_NAME).write_text(json.dumps(CONTENT))
    found = of_features(str(tmp_path), [1, 7])
    assert found == {
        "card": {"fvu": 0.25},
        "sites": {},
        "features": {
            "1": {
                "max": 2.5,
                "contexts": [["a ", "b", " c"]],
                "neuronpedia": "model/site",
            },
            "7": {"neuronpedia": "model/site"},
        },
    }


def test_the_manifest_says_what_the_evidence_leaves_out(tmp_path: Path) -> None:
    site = {"layer": 3, "hook": "post_block", "fvu": 0.2, "l0": 40}
    manifest = {"format": "vllm-sae", "sites": [site, {**site, "layer": 4, "l0": 50}]}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert of_features(str(tmp_path), [])["sites"] == {
        "post_block.3": {"fvu": 0.2, "l0": 40},
        "post_block.4": {"fvu": 0.2, "l0": 50},
    }


@pytest.mark.parametrize("inner", [True, False])
def test_the_neuronpedia_id_of_saelens(tmp_path: Path, inner: bool) -> None:
    known = {"neuronpedia_id": "gpt2-small/6-res-jb"}
    config = {"metadata": known} if inner else known
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    assert of_features(str(tmp_path), [7])["features"]["7"] == {
        "neuronpedia": "gpt2-small/6-res-jb"
    }


def test_other_broken_files_say_nothing(tmp_path: Path) -> None:
    (tmp_path / "cfg.json").write_text("{")
    (tmp_path / "manifest.json").write_text('{"sites": [1, {}]}')
    assert of_features(str(tmp_path), [0])["features"] == {"0": {}}


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / EVIDENCE_NAME
    file.write_text(json.dumps(CONTENT))
    of_features(str(tmp_path), [1])
    file.write_text(json.dumps({**CONTENT, "max": [1.5, 30.0]}))
    assert of_features(str(tmp_path), [1])["features"]["1"]["max"] == 30.0


@pytest.mark.parametrize("path", ["/no/such/folder", "hf:owner/repo", "nul\0"])
def test_no_file_is_no_evidence(path: str) -> None:
    assert of_features(path, [1]) == {"card": {}, "sites": {}, "features": {"1": {}}}


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"max": [NaN]}', '{"card": {"a": "\\ud800"}}', "[" * 100_000]
)
def test_a_broken_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / EVIDENCE_NAME).write_text(text)
    with pytest.raises(RequestRefused, match=EVIDENCE_NAME) as caught:
        of_features(str(tmp_path), [0])
    assert caught.value.status == 409


def test_indices() -> None:
    assert parse_indices("3,457") == [3, 457]
    assert parse_indices("") == parse_indices(None) == []
    for bad in ("a", "-1", "1.5", "1,,²", "9" * 10, ",".join(["1"] * 257)):
        with pytest.raises(RequestRefused, match="index: found .* expected at most"):
            parse_indices(bad)


def test_the_route_answers_for_modules_of_the_engine(
    client: TestClient, root: Path
) -> None:
    try:
        (root / "other" / EVIDENCE_NAME).write_text(json.dumps(CONTENT))
        answer = client.get(f"{MODULES}/first/evidence?index=0")
        assert answer.json()["features"]["0"]["max"] == 1.5
        for path in ("evidence?index=0,63,64", "features?index=64"):
            beyond = client.get(f"{MODULES}/first/{path}")
            assert beyond.status_code == 400
            error = beyond.json()["error"]
            assert error["message"] == "index: found 64, expected 0..63"
            assert error["param"] == "index"
        (site,) = client.get(f"{MODULES}/first").json()["module"]["sites"]
        assert answer.json()["site"] == site["name"]
        named = f"{MODULES}/first/evidence?index=0&site={site['name']}"
        assert client.get(named).json() == answer.json()
        for bad in ("post_blok.1", "post_block.99", ""):
            refused = client.get(f"{MODULES}/first/evidence?site={bad}")
            assert refused.status_code == 400
            error = refused.json()["error"]
            assert error["message"].startswith(f"site: found '{bad}', expected one of")
            assert site["name"] in error["message"] and error["param"] == "site"
        missing = client.get(f"{MODULES}/nobody/evidence")
        assert missing.status_code == 404
        assert missing.json()["error"]["param"] == "name"
    finally:
        (root / "other" / EVIDENCE_NAME).unlink()


def test_the_route_only_reads_and_needs_no_steering_key(
    serve: Callable[..., TestClient],
) -> None:
    with serve(sends=None) as client:
        assert client.get(f"{MODULES}/first/evidence").json()["card"] == {}


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node.js")
def test_scripts_parse() -> None:
    import subprocess

    for path in FOLDER.glob("*.js"):
        command = ["node", "--input-type=module", "--check"]
        with path.open() as source:
            subprocess.run(command, stdin=source, check=True)
