# SPDX-License-Identifier: Apache-2.0
"""Start-up: which modules are screened, and what is refused by name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from tests.plugins.steering.conftest import D_SAE
from vllm.config import VllmConfig
from vllm.config import steering_screening as screening
from vllm.config.steering import SteeringConfig, get_steering_config
from vllm.config.steering_checks import SteeringConfigError
from vllm.engine import steering_topology
from vllm.engine.arg_utils import EngineArgs
from vllm.engine.steering_resolution import resolve_steering


@pytest.fixture(scope="module")
def vllm_config(model_path: Path) -> VllmConfig:
    args = EngineArgs(
        str(model_path), skip_tokenizer_init=True, max_model_len=128, dtype="bfloat16"
    )
    return args.create_engine_config()


@pytest.fixture
def can_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that screens, and SAEs that are wide enough."""
    monkeypatch.setattr(steering_topology, "can_screen", lambda dtype: True)
    monkeypatch.setattr(screening, "AUTO_SCREENED_BYTES", 1)


def resolved(base: VllmConfig, steering: dict[str, Any]) -> SteeringConfig:
    config = copy.copy(base)
    config.additional_config = {"steering": steering}
    resolve_steering(config)
    found = get_steering_config(config.additional_config)
    assert found is not None
    return found


def spare(**options: Any) -> dict[str, Any]:
    entry = {"layer": 1, "hook": "post_block", "width": 32, **options}
    return {"spare": [entry]}


@pytest.mark.usefixtures("can_screen")
@pytest.mark.parametrize(("asked", "screened"), [("auto", (0,)), ("off", ())])
def test_a_module_says_whether_it_is_screened(
    vllm_config: VllmConfig, sae_path: Path, asked: str, screened: tuple[int, ...]
) -> None:
    module = {"path": str(sae_path), "screening": asked}
    config = resolved(vllm_config, {"modules": {"m": module}})
    assert config.modules["m"].screened == screened
    slots = resolved(vllm_config, spare(screening=asked)).slots
    assert [slot.screened for slot in slots if slot] == [bool(screened)]


def test_a_device_that_cannot_screen_holds_no_copy(
    vllm_config: VllmConfig, sae_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(screening, "AUTO_SCREENED_BYTES", 1)
    module = {"path": str(sae_path), "screening": "auto"}
    config = resolved(vllm_config, {"modules": {"m": module}})
    assert config.modules["m"].screened == ()
    assert config.modules["m"].sites[0].d_sae == D_SAE


@pytest.mark.parametrize("value", ["on", True, None, 8])
def test_another_value_is_refused_by_name(
    vllm_config: VllmConfig, sae_path: Path, value: object
) -> None:
    module = {"path": str(sae_path), "screening": value}
    expected = r'screening: found .*, expected one of "auto", "off"'
    with pytest.raises(SteeringConfigError, match=expected):
        resolved(vllm_config, {"modules": {"m": module}})
    with pytest.raises(SteeringConfigError, match=r"spare\[0\]\." + expected):
        resolved(vllm_config, spare(screening=value))


def test_vectors_have_nothing_to_screen(vllm_config: VllmConfig) -> None:
    entry = {"layer": 1, "hook": "post_block", "vectors": 2, "screening": "auto"}
    with pytest.raises(SteeringConfigError, match=r"screening: .*only with width"):
        resolved(vllm_config, {"spare": [entry]})
