# SPDX-License-Identifier: Apache-2.0
"""Every text-generation model of the installed vLLM: in the table, recognised by name
under `decoder_layer: "auto"`, or refused with a reason. A new vLLM release may add a
model that is none of these; the tests then name it."""

from __future__ import annotations

import pytest
import torch
from steering_testing.vllm_registry import (
    ARCHITECTURES,
    decoder_layers,
    stand_in,
)
from torch import nn

from vllm.model_executor.layers.steering_auto_family import recognise
from vllm.model_executor.layers.steering_families import (
    find_decoder_layers,
    refuse_unfit_layers,
)
from vllm.model_executor.layers.steering_family_table import FAMILIES, UNFIT

# Models without decoder layers of their own, and why.
WRAPPERS = {
    "HCXVisionV2ForCausalLM": "its configuration names the language model, which has",
}


def fate(layer_class: str) -> str:
    """What becomes of a decoder-layer class."""
    if layer_class in FAMILIES:
        return "in the table"
    if layer_class.rsplit(".", 1)[1] in UNFIT:
        return "refused"
    if recognise(stand_in(layer_class)) is not None:
        return "recognised by name"
    return "nothing"


@pytest.mark.slow
@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - set(WRAPPERS)))
def test_every_text_model_of_vllm_is_known_recognised_or_refused(
    architecture: str,
) -> None:
    layers = decoder_layers(architecture)
    assert layers, f"no decoder-layer class of {architecture} was found"
    lost = sorted(name for name in layers if fate(name) == "nothing")
    assert not lost, (
        f"{architecture}: {lost} are neither in FAMILIES nor in UNFIT "
        "(vllm/model_executor/layers/steering_family_table.py), and decoder_layer auto "
        "does not recognise their names"
    )


@pytest.mark.slow
def test_models_with_several_classes_of_layers_are_known_or_refused() -> None:
    """`auto` checks one class. Of some models vLLM has a class for each platform."""
    for architecture in ARCHITECTURES:
        kinds = {name.rsplit(".", 1)[1] for name in decoder_layers(architecture)}
        fates = {fate(name) for name in decoder_layers(architecture)}
        if len(kinds) > 1 and "recognised by name" in fates:
            assert architecture in ONE_OF_SEVERAL, (architecture, kinds)


# Their source names other classes too, but each model has layers of one class.
ONE_OF_SEVERAL = {
    "DeepseekV32ForCausalLM",
    "GlmMoeDsaForCausalLM",
    "MiniCPM3ForCausalLM",
}


@pytest.mark.slow
def test_the_list_of_refused_classes_is_not_out_of_date() -> None:
    found = {name for at in ARCHITECTURES for name in decoder_layers(at)}
    assert set(UNFIT) <= {name.rsplit(".", 1)[1] for name in found}
    assert not set(UNFIT) & {name.rsplit(".", 1)[1] for name in FAMILIES}


@pytest.mark.slow
def test_what_the_scan_sees_is_what_the_class_has() -> None:
    """On classes of the table: the stand-in has the parts that real layers have."""
    own = {name: family for name, family in FAMILIES.items() if family.mlp == "mlp"}
    seen = {name for at in ARCHITECTURES for name in decoder_layers(at)} & set(own)
    assert len(seen) > 15
    for name in seen:
        children = dict(stand_in(name).named_children())
        assert {"mlp", *own[name].attention} & set(children) > {"mlp"}, name


class DbrxBlock(nn.Module):
    """Has the name of a class that is refused."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states


def test_an_unfit_layer_is_refused_by_name_with_the_reason() -> None:
    model = nn.Sequential()
    model.add_module("layers", nn.ModuleList([DbrxBlock()]))
    for refuse in (refuse_unfit_layers, find_decoder_layers):
        with pytest.raises(ValueError) as refusal:
            refuse(model)
        message = str(refusal.value)
        assert "Sequential cannot be steered: found decoder layers of" in message
        assert f"DbrxBlock; {UNFIT['DbrxBlock']}" in message
