# SPDX-License-Identifier: Apache-2.0
"""The specs of the Python interface take a site as `(hook, layer)`, too."""

from __future__ import annotations

from typing import Any

import pytest

from vllm.config.sae_steering_specs import SteeringFields
from vllm.config.sae_steering_types import (
    SAEClampEntry,
    SAEClampSpec,
    SAEFullReconstructionSpec,
    SAEReadoutSpec,
    SteeringVectorSpec,
)
from vllm.config.steering_points import HookPoint
from vllm.config.steering_reader import Reader
from vllm.exceptions import VLLMValidationError

READER = Reader(SteeringFields)
PAIR, NAME = ("post_block", 20), "post_block.20"
ENTRY = SAEClampEntry(1, "absolute", 2.0)


def read(field: str, spec: Any) -> Any:
    (found,) = getattr(READER.read({field: [spec]}), field)
    return found


@pytest.mark.parametrize("pair", [PAIR, (HookPoint.POST_BLOCK, 20)], ids=str)
def test_a_pair_is_the_site_of_that_name(pair: Any) -> None:
    for kind, field in (
        (SAEClampSpec, "sae_clamp_specs"),
        (SAEFullReconstructionSpec, "sae_full_reconstruction_specs"),
    ):
        asked = {pair: [ENTRY], "post_block.12": [ENTRY]}
        assert read(field, kind("sae", asked)).clamps == {
            NAME: [ENTRY],
            "post_block.12": [ENTRY],
        }
    spec = SAEReadoutSpec("sae", sites=[pair, "post_block.12"], top_k=1)
    assert read("sae_readout_specs", spec).sites == [NAME, "post_block.12"]
    vector = SteeringVectorSpec(vector="AAAA", site=pair)
    assert read("steering_vector_specs", vector).site == NAME


def test_other_forms_are_left_as_they_are() -> None:
    clamps: Any = {"post_block": {20: [ENTRY]}}
    assert SAEClampSpec("sae", clamps).clamps is clamps
    sites: Any = {"post_block": [20]}
    assert SAEReadoutSpec("sae", sites=sites, top_k=1).sites is sites


def test_a_site_that_is_given_in_two_forms_does_not_vanish() -> None:
    clamps: Any = {PAIR: [ENTRY], NAME: []}
    with pytest.raises(VLLMValidationError, match=r"^sae_clamp_specs\[0\].clamps"):
        read("sae_clamp_specs", SAEClampSpec("sae", clamps))


@pytest.mark.parametrize("bad", [("post_block",), ("post_block", "20"), (20,)], ids=str)
def test_a_tuple_that_is_no_site_is_refused(bad: Any) -> None:
    with pytest.raises(VLLMValidationError, match=r"^sae_clamp_specs\[0\].clamps"):
        read("sae_clamp_specs", SAEClampSpec("sae", {bad: [ENTRY]}))
    with pytest.raises(VLLMValidationError, match=r"sites\[0\]: .*post_block.20"):
        read("sae_readout_specs", SAEReadoutSpec("sae", sites=[bad], top_k=1))
    with pytest.raises(VLLMValidationError, match=r"site: .*post_block.20"):
        read("steering_vector_specs", SteeringVectorSpec(vector="AAAA", site=bad))
