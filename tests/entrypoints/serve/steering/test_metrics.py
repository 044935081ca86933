# SPDX-License-Identifier: Apache-2.0
"""The metrics of modules; those of modules that left are bounded."""

from __future__ import annotations

from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from prometheus_client import generate_latest
from steering_testing.engine import FULL, generate, params, sae_spec
from steering_testing.requests import prompt

from tests.entrypoints.serve.steering.conftest import URL, Serve
from vllm import LLM
from vllm.entrypoints.serve.steering.metrics import (
    SteeringMetrics,
    count_refusal,
    count_request,
)
from vllm.v1.worker import steering_module_changes

pytestmark = pytest.mark.engine


def register(client: TestClient, root: Path, name: str) -> None:
    body = {"name": name, "path": str(root / "good")}
    assert client.post(URL, json=body).status_code == 201


def test_the_metrics_show_modules_rows_tokens_and_refusals(
    serve: Serve, root: Path, llm: LLM
) -> None:
    with serve() as client:
        metrics: SteeringMetrics = client.app.state.steering_metrics  # type: ignore
        register(client, root, "hot")
        ask = params(3, **{FULL: [sae_spec("hot")]})
        generate(llm, [prompt(1, 9)], [ask])
        count_refusal(f"{FULL}[0].module_name")
        count_request({FULL: [{"module_name": "hot"}, {"module_name": "hot"}]})
        client.portal.call(metrics.refresh)  # type: ignore[union-attr]
        shown = generate_latest().decode()
        assert client.delete(f"{URL}/hot").status_code == 200
    assert "vllm:steering_modules 2.0" in shown
    assert 'vllm:steering_rows_in_use{tier="full"}' in shown
    for name, labels, least in [
        ("tokens", 'module="hot",phase="decode",tier="full"', 2),
        ("bypassed_tokens", 'module="hot"', 1),
        ("saturated_tokens", 'module="hot"', 0),
        ("saturated_tokens", 'module="first"', 0),
    ]:
        total = shown.split(f"vllm:steering_{name}_total{{{labels}}} ")[1]
        assert float(total.split()[0]) >= least, name
    assert f'vllm:steering_requests_total{{field="{FULL}",module="hot"}} 1.0' in shown
    assert 'vllm:steering_refused_requests_total{reason="module"} 1.0' in shown


def test_series_of_modules_that_left_first_are_dropped(
    serve: Serve, root: Path, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steering_module_changes, "MAX_REMOVED", 2)
    with serve() as client:
        metrics: SteeringMetrics = client.app.state.steering_metrics  # type: ignore

        def come_and_go(name: str) -> str:
            register(client, root, name)
            generate(llm, [prompt(1, 9)], [params(3, **{FULL: [sae_spec(name)]})])
            count_request({FULL: [{"module_name": name}]})
            client.portal.call(metrics.refresh)  # type: ignore[union-attr]
            assert client.delete(f"{URL}/{name}").status_code == 200
            client.portal.call(metrics.refresh)  # type: ignore[union-attr]
            return generate_latest().decode()

        for at in range(4):
            shown = come_and_go(f"m{at}")
        for at in range(4):
            named = f'module="m{at}"'
            lines = [line for line in shown.splitlines() if named in line]
            assert bool(lines) == (at >= 2), lines
        # One that comes back counts from zero, and is the last that left.
        shown = come_and_go("m0")
        assert (
            f'vllm:steering_requests_total{{field="{FULL}",module="m0"}} 1.0' in shown
        )
        assert 'module="m2"' not in shown
