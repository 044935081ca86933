# SPDX-License-Identifier: Apache-2.0
"""Servers whose tensor-parallel ranks share SAEs: registration, refusals, answers and
counts, with one data-parallel rank and with two."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save_file
from steering_testing import models, oracle
from steering_testing.engine import FULL, save_sae
from steering_testing.modules_http import (
    KEY,
    MODULES,
    ask,
    complete,
    register,
    remove,
    save_modules,
    steering_server,
    tokens,
)
from steering_testing.reference import Edit, random_sae

pytestmark = [pytest.mark.server, pytest.mark.slow]

SITE = (1, "post_block")
PROMPT = [5, 6, 7, 8]
D_SAE = 96
SPARE = {"layer": 1, "hook": "resid_post", "width": D_SAE, "sharding": "shard"}
LAYOUTS = {
    "tp2": ("--tensor-parallel-size", "2"),
    "tp2-dp2": ("--tensor-parallel-size", "2", "--data-parallel-size", "2"),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = save_modules(tmp_path_factory.mktemp("root").resolve())
    save_sae(root / "odd", {SITE: random_sae(40, models.HIDDEN, "relu", 3)})
    vector = {"layers.1.post_block": torch.ones(models.HIDDEN)}
    save_file(vector, root / "v.safetensors")
    return root


@pytest.fixture(scope="module", params=list(LAYOUTS))
def server(
    request: pytest.FixtureRequest,
    model_root: Path,
    root: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[str, list[int | None]]]:
    """A server's address, and the data-parallel ranks to ask."""
    log = tmp_path_factory.mktemp("server") / "log"
    arguments = (*LAYOUTS[request.param], "--enforce-eager")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        with steering_server(
            model_root, root, log, {"spare": [SPARE]}, *arguments
        ) as started:
            yield started.url, [0, 1] if request.param.endswith("dp2") else [None]


def expected(seed: int) -> list[int]:
    """What Hugging Face answers under the SAE of this seed."""
    sae = random_sae(D_SAE, models.HIDDEN, "jumprelu", seed)
    edits = {SITE: [Edit("full", sae)]}
    return oracle.greedy(models.build("llama"), PROMPT, edits, 6).tokens


def listed(url: str) -> list[dict[str, Any]]:
    return httpx.get(url + MODULES, headers=KEY, timeout=120).json()["modules"]


def saturated(url: str) -> int:
    """The counter of the module `hot`, over all engines."""
    found = httpx.get(url + MODULES, headers=KEY, timeout=120).json()
    return found["module_tokens"]["hot"]["saturated"]


def test_ranks_share_what_is_registered_and_answer_as_hugging_face(
    server: tuple[str, list[int | None]], root: Path
) -> None:
    url, ranks = server
    made = register(url, root, sharding="shard")
    assert made.status_code == 201, made.text
    (module,) = listed(url)
    assert (module["sharding"], module["sharded"]) == ("shard", [0])
    whole = 2 * 4 * D_SAE * models.HIDDEN
    assert whole / 2 < module["weight_bytes"] < whole / 2 + 12 * D_SAE + 999
    for rank in ranks:
        assert tokens(ask(url, "hot", 6, rank)) == expected(0)
    again = register(url, root, path=str(root / "two"), replace=True)
    assert again.status_code == 201, again.text
    for rank in ranks:
        assert tokens(ask(url, "hot", 6, rank)) == expected(1)
    bad = register(url, root, path=str(root / "nan"), replace=True)
    assert bad.status_code == 400 and "NaN" in bad.json()["error"]["message"]
    for rank in ranks:
        assert tokens(ask(url, "hot", 6, rank)) == expected(1)
    before = saturated(url)
    huge = {"feature_idx": D_SAE - 1, "kind": "absolute", "value": 2.0**70}
    for rank in ranks:
        spec = {"module_name": "hot", "clamps": [huge]}
        assert complete(url, {FULL: [spec]}, 3, rank).status_code == 200
    # A token that both ranks write counts once; the last token is not computed.
    assert saturated(url) - before == (len(PROMPT) + 2) * len(ranks)
    assert remove(url).status_code == 200


REFUSED: list[tuple[dict[str, Any], int, tuple[str, ...]]] = [
    ({"sharding": value}, 400, ("sharding: found", '"shard"'))
    for value in ("all", "SHARD", "", None, True, 2, ["shard"], {"shard": 2})
]
REFUSED += [
    (
        {"path": "odd", "sharding": "shard"},
        400,
        ("'hot': sharding", "40 features and 64 columns on 2 ranks", "multiples of 32"),
    ),
    ({"path": "v.safetensors", "sharding": "shard"}, 400, ("steering vectors",)),
]


@pytest.mark.parametrize(("fields", "status", "parts"), REFUSED, ids=str)
def test_what_ranks_cannot_share_is_refused(
    server: tuple[str, list[int | None]],
    root: Path,
    fields: dict[str, Any],
    status: int,
    parts: tuple[str, ...],
) -> None:
    url, _ = server
    if "path" in fields:
        fields = {**fields, "path": str(root / fields["path"])}
    answer = register(url, root, **fields)
    assert answer.status_code == status, answer.text
    message = answer.json()["error"]["message"]
    for part in parts:
        assert part in message
    assert listed(url) == []
