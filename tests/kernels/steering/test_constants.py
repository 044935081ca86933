# SPDX-License-Identifier: Apache-2.0
"""What Python and C++ both state is the same: reads csrc/steering/constants.cuh."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

from vllm.config import steering_screening
from vllm.config.steering import MAX_READ_VALUES
from vllm.model_executor.layers.steering_kernels import bundles, plan, screen
from vllm.model_executor.layers.steering_limits import (
    COEFFICIENT_LIMIT,
    STREAM_LIMIT,
)
from vllm.model_executor.layers.steering_read_state import TABLE_HEAD
from vllm.model_executor.layers.steering_state import (
    CONDITION_SHIFT,
    KIND_BITS,
    ONLY_IF_ACTIVE,
    SYNC_INTS,
    ClampFlag,
    ClampKind,
    MetaField,
)

SOURCE = Path(__file__).parents[3] / "csrc" / "steering" / "constants.cuh"
BUNDLES = {
    "WeightsField": bundles.WEIGHTS_FIELDS,
    "WorkspaceField": bundles.WORKSPACE_FIELDS,
    "StepField": bundles.STEP_FIELDS,
    "StreamField": bundles.STREAM_FIELDS,
    "ScreenField": screen.SCREEN_FIELDS,
    "GuessField": bundles.GUESS_FIELDS,
}


def plain(name: str) -> str:
    """`kTopkRelu`, `TOPK_RELU`, `topk_relu` alike."""
    return name.replace("_", "").lower()


def test_triton_limits_what_the_reference_limits() -> None:
    """Read as text, since the module needs Triton to be imported."""
    text = (Path(plan.__file__).parent / "clamp.py").read_text()
    found = dict(re.findall(r"(\w+LIMIT\w*) = tl\.constexpr\(2\.0\*\*(\d+)\)", text))
    assert {name: 2.0 ** int(power) for name, power in found.items()} == {
        "COEFFICIENT_LIMIT": COEFFICIENT_LIMIT,
        "STREAM_LIMIT": STREAM_LIMIT[torch.bfloat16],
        "STREAM_LIMIT_FLOAT16": STREAM_LIMIT[torch.float16],
    }
    assert STREAM_LIMIT[torch.float32] == STREAM_LIMIT[torch.bfloat16]


def stated_enums() -> dict[str, dict[str, int]]:
    """Every enum of the header: plain member name to value."""
    found = re.findall(r"enum (\w+) \{(.*?)\};", SOURCE.read_text(), re.DOTALL)
    return {
        name: {plain(m[1:]): int(v) for m, v in re.findall(r"(k\w+) = (\d+)", body)}
        for name, body in found
    }


def stated_numbers() -> dict[str, int]:
    found = re.findall(r"constexpr int k(\w+) = (\d+);", SOURCE.read_text())
    return {plain(name): int(value) for name, value in found}


def test_the_columns_of_meta_are_those_of_python() -> None:
    assert stated_enums()["Meta"] == {plain(f.name): f.value for f in MetaField}


def test_the_codes_of_clamps_are_those_of_python() -> None:
    want = {plain(kind.name): kind.value for kind in ClampKind}
    want |= {plain(flag.name): flag.value for flag in ClampFlag}
    assert stated_enums()["ClampCode"] == {**want, "onlyifactive": ONLY_IF_ACTIVE}


def test_triton_has_the_codes_of_clamps_that_python_has() -> None:
    """Read as text, since the module needs Triton to be imported."""
    text = (Path(plan.__file__).parent / "clamp.py").read_text()
    found = dict(re.findall(r"^(\w+) = tl\.constexpr\((\d+)\)", text, re.MULTILINE))
    want = {kind.name: kind.value for kind in ClampKind if kind.value}
    want |= {flag.name: flag.value for flag in ClampFlag}
    want |= {"ONLY_IF_ACTIVE": ONLY_IF_ACTIVE, "KIND_BITS": KIND_BITS}
    want |= {"CONDITION_SHIFT": CONDITION_SHIFT, "EFFECT": (1 << CONDITION_SHIFT) - 1}
    assert {name: int(value) for name, value in found.items()} == want


def test_triton_begins_a_sum_where_the_extension_begins_it() -> None:
    """For tokens that it encodes again to read them."""
    text = SOURCE.with_name("scheduler.cuh").read_text()
    stated = dict(re.findall(r"constexpr int (k\w+) = (\d+);", text))
    assert "return f / 2 * kOrderStep % k_tiles;" in text
    readout = (Path(plan.__file__).parent / "readout.py").read_text()
    found = dict(re.findall(r"^(ORDER_\w+) = tl\.constexpr\((\d+)\)", readout, re.M))
    assert found["ORDER_STEP"] == stated["kOrderStep"]
    assert int(found["ORDER_FEATURES"]) == 2 * int(stated["kTileF"])
    assert int(stated["kTileK"]) == plan.LEAST_REDUCTION


@pytest.mark.parametrize("bundle", BUNDLES)
def test_a_bundle_has_its_tensors_in_the_order_of_python(bundle: str) -> None:
    want = {plain(field): i for i, field in enumerate(BUNDLES[bundle])}
    assert stated_enums()[bundle] == want


def test_every_number_of_the_header_has_its_python_twin() -> None:
    twins = {plain(k): v for k, v in vars(plan).items() if isinstance(v, int)}
    twins["syncints"] = SYNC_INTS
    for module in (screen, steering_screening):
        twins |= {plain(k): v for k, v in vars(module).items() if isinstance(v, int)}
    twins |= {"kindbits": KIND_BITS, "conditionshift": CONDITION_SHIFT}
    twins |= {"maxread": MAX_READ_VALUES, "tablehead": TABLE_HEAD}
    twins["coefficientlimit"] = int(math.log2(COEFFICIENT_LIMIT))
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        twins[f"streamlimit{name}"] = int(math.log2(STREAM_LIMIT[dtype]))
    numbers = stated_numbers()
    assert numbers
    assert numbers == {name: twins[name] for name in numbers}


def test_the_clamp_kernels_shared_memory() -> None:
    """Python decides by it whether a block fits a device."""
    text = SOURCE.with_name("clamp_rows.cuh").read_text()
    stated = dict(re.findall(r"(k\w+) = (\d+)[,;]", text))
    assert int(stated["kClampThreads"]) == plan.CLAMP_THREADS
    assert int(stated["kClampGroup"]) == plan.CLAMP_GROUP
    assert int(stated["kRingParts"]) + 1 == plan.CLAMP_RING
