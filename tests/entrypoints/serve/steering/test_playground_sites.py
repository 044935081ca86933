# SPDX-License-Identifier: Apache-2.0
"""The playground works on one site of a module, which the reader chooses."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from steering_testing.page_scripts import run_in_node

from vllm.config.sae_steering_specs import SPEC_TYPES, SteeringFields
from vllm.config.steering_reader import Reader

pytestmark = pytest.mark.skipif(shutil.which("node") is None, reason="needs Node.js")

FIRST, SECOND = "post_block.1", "post_block.2"
RECORD = {
    "positions": [1],
    "features": [[7]],
    "values": [[2.0]],
    "num_active": [1],
}
SEVERAL = {
    "name": "sae",
    "kind": "sae",
    "sites": [{"name": FIRST, "d_sae": 16}, {"name": SECOND, "d_sae": 32}],
}
SINGLE = {"name": "one", "kind": "sae", "sites": [{"name": FIRST, "d_sae": 8}]}
ANSWERS: dict[str, Any] = {
    "/v1/models": {"data": [{"id": "m"}]},
    "/openapi.json": {"paths": {"/v1/steering/encode": {}}},
    "/v1/steering/encode": {
        "data": [
            {"tokens": ["<s>", " a"], "sae_features": {FIRST: RECORD, SECOND: RECORD}},
            {"tokens": ["<s>"], "sae_features": {}},
        ]
    },
    "/v1/steering/modules/sae/evidence": {
        "card": {},
        "sites": {FIRST: {"l0": 3}, SECOND: {"fvu": 0.5}},
        "features": {"7": {"max": 4, "contexts": [["of ", "it", " all"]]}},
    },
    "/v1/steering/modules/sae/features": {"features": []},
    "/v1/steering/modules/one/evidence": {"card": {}, "sites": {}, "features": {}},
    "/v1/steering/modules": {"modules": [SEVERAL, SINGLE]},
}


@pytest.mark.parametrize("mode", ["reconstruction", "delta", "full"])
def test_a_request_edits_and_reads_the_chosen_site_alone(
    tmp_path: Path, mode: str
) -> None:
    script = f"""
    import {{ reading, request }} from "./specs.js";
    const clamp = {{ feature_idx: 7, kind: "absolute", value: 2 }};
    const state = {{ model: "m", prompt: "p", module: "sae", site: "{SECOND}",
      clamps: [{{ entry: clamp, where: {{}} }}], vectors: [] }};
    const {{ body }} = request("{mode}", state);
    console.log(JSON.stringify({{ ...body, sae_readout_specs: reading(state, 24) }}));
    """
    body = run_in_node(tmp_path, script, {})
    asked = {key: body[key] for key in SPEC_TYPES if key in body}
    read = Reader(SteeringFields).read(asked)
    (spec,) = read.sae_clamp_specs or read.sae_full_reconstruction_specs or []
    assert spec.clamps.keys() == {SECOND}
    assert len(spec.clamps[SECOND]) == (0 if mode == "reconstruction" else 1)
    (readout,) = read.sae_readout_specs or []
    assert readout.sites == [SECOND]


def test_a_text_is_searched_at_the_chosen_site(tmp_path: Path) -> None:
    script = f"""
    import {{ byText }} from "./search.js";
    const {{ found, texts }} = await byText("sae", "{SECOND}", ["a"], ["b"]);
    console.log(JSON.stringify({{ found, texts, body: asked[0].body }}));
    """
    answer = run_in_node(tmp_path, script, ANSWERS)
    assert answer["body"]["sites"] == [SECOND]
    assert [one["feature"] for one in answer["found"]] == [7]
    assert answer["texts"] == [{"tokens": ["<s>", " a"], **RECORD}]


def test_the_page_shows_the_evidence_of_the_site_that_is_chosen(tmp_path: Path) -> None:
    script = f"""
    import "./app.js";
    const look = async () => {{
      await settled();
      const index = asked.length;
      $("text-a").value = "a";
      $("text-form").listeners.submit({{ preventDefault() {{}} }});
      await settled();
      return {{ facts: $("module-facts").textContent, found: $("found").text(),
        sites: $("module-sites").text(), hidden: $("site-choice").hidden,
        paths: asked.slice(index).map(({{ path }}) => path) }};
    }};
    const first = await look();
    $("site").value = "{SECOND}";
    $("site").listeners.change();
    const gone = $("found").text();
    const second = await look();
    $("module").value = "one";
    $("module").listeners.change();
    await settled();
    const single = $("site-choice").hidden;
    console.log(JSON.stringify({{ first, gone, second, single }}));
    """
    shown = run_in_node(tmp_path, script, ANSWERS)
    for site, width in ((FIRST, 16), (SECOND, 32)):
        one = shown["first" if site == FIRST else "second"]
        assert one["facts"] == f"{width} features"
        assert one["sites"] == f"{FIRST}: L0 3 {SECOND}: FVU 0.5"
        assert one["hidden"] is False
        evidence = [path for path in one["paths"] if "/evidence?" in path]
        assert evidence and all(path.endswith(f"&site={site}") for path in evidence)
        assert "maximum 4" in one["found"] and "it" in one["found"]
    assert shown["gone"] == "" and shown["single"] is True
