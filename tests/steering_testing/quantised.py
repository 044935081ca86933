# SPDX-License-Identifier: Apache-2.0
"""A tiny model with quantised linear layers, and what its weights stand for.

Written from the formats' own description: GPTQ packs eight inputs into an int32, AWQ
eight outputs in the order 0 2 4 6 1 3 5 7; compressed-tensors has one scale for each
output. All are symmetric. Engines run in bfloat16. Eight-bit layers round activations
too, each token in units of its own; so do the layers of the oracle (`RoundedLinear`).
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from steering_testing import models
from steering_testing.cases import BFLOAT16, CASES, Case
from steering_testing.conformance import (
    MAX_TOKENS,
    requests,
    site_modules,
    steered_classes,
)
from steering_testing.engine import engine, generate, params
from steering_testing.matrix import departs
from steering_testing.oracle import SiteEdits, follow
from steering_testing.requests import prompt, specs

GROUP = 32
Tensors = dict[str, torch.Tensor]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def four_bits(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`q [in, out]` in 0..15 with zero at 8, and scales `[in / GROUP, out]`."""
    w = weight.T.reshape(-1, GROUP, weight.shape[0])
    scales = (w.abs().amax(1) / 7).half().float()
    q = (w / scales[:, None]).round().clamp(-8, 7) + 8
    return q.reshape(-1, weight.shape[0]).int(), scales


def stands_for(q: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The weight `[out, in]` that four bits stand for."""
    return ((q - 8) * scales.repeat_interleave(GROUP, 0)).T


def pack(values: torch.Tensor) -> torch.Tensor:
    """Eight values of the last dimension in an int32, the first in the lowest bits."""
    shifts = torch.arange(0, 32, 4)
    words = (values.long().unflatten(-1, (-1, 8)) << shifts).sum(-1)
    return (words - (words >> 31 << 32)).int()


def gptq(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    q, scales = four_bits(weight)
    zeros = torch.full_like(scales, 7).int()  # the format stores one less
    stored = {
        "qweight": pack(q.T).T.contiguous(),
        "qzeros": pack(zeros),
        "scales": scales.half(),
        "g_idx": (torch.arange(q.shape[0]) // GROUP).int(),
    }
    return stored, stands_for(q, scales)


def awq(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    q, scales = four_bits(weight)
    zeros = torch.full_like(scales, 8).int()

    def ordered(values: torch.Tensor) -> torch.Tensor:
        return pack(values.unflatten(-1, (-1, 8))[..., AWQ_ORDER].flatten(-2))

    stored = {"qweight": ordered(q), "qzeros": ordered(zeros), "scales": scales.half()}
    return stored, stands_for(q, scales)


def eight_bits(
    most: float, cast: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]:
    """compressed-tensors: one scale for each output, activations for each token."""

    def quantise(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        scale = (weight.abs().amax(1, keepdim=True) / most).bfloat16().float()
        stored = cast((weight / scale).clamp(-most, most))
        found = {"weight": stored, "weight_scale": scale.bfloat16()}
        return found, stored.float() * scale

    return quantise


def compressed(kind: str) -> dict[str, Any]:
    """compressed-tensors' description of eight-bit weights and activations."""
    common = {"num_bits": 8, "type": kind, "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**common, "strategy": "channel", "dynamic": False},
        "input_activations": {**common, "strategy": "token", "dynamic": True},
    }
    return {
        "quant_method": "compressed-tensors",
        "format": f"{kind}-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def round_int8(x: torch.Tensor) -> torch.Tensor:
    unit = x.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 127
    return (x / unit).round() * unit


def round_fp8(x: torch.Tensor) -> torch.Tensor:
    unit = x.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448
    return (x / unit).to(torch.float8_e4m3fn).to(x.dtype) * unit


ROUND = {"int8": round_int8, "fp8": round_fp8}


class RoundedLinear(torch.nn.Linear):
    """A linear layer that rounds its input as the engine's does."""

    rounded: Callable[[torch.Tensor], torch.Tensor]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.rounded(x.bfloat16().to(x.dtype)))


def round_inputs(model: Any, how: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Make every linear layer of the decoder layers a `RoundedLinear`."""
    for name, module in model.named_modules():
        if "layers." in name and type(module) is torch.nn.Linear:
            module.__class__ = RoundedLinear
            module.rounded = how


def round_either_way(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """float32 to bfloat16 values, up or down at random, the nearer the likelier."""
    bits = x.contiguous().view(torch.int32)
    below = torch.randint(1 << 16, bits.shape, generator=generator, dtype=torch.int32)
    return ((bits + below) & -(1 << 16)).view(torch.float32)


def unsettled(model: Any, seed: int) -> Any:
    """A copy of the model that rounds what its layers' modules say, either way."""
    copied = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)

    def round_output(module: Any, args: Any, out: Any) -> Any:
        if isinstance(out, tuple):
            return (round_either_way(out[0], generator), *out[1:])
        return round_either_way(out, generator)

    for name, module in copied.named_modules():
        if "layers." in name and not name.endswith("act_fn"):
            module.register_forward_hook(round_output)
    return copied


def spread(
    variants: list[Any], ids: list[int], edits: SiteEdits, tokens: list[int]
) -> float:
    """How far apart models' log-probabilities of a token are, at most."""
    all_said = [follow(model, ids, edits, tokens).logprobs for model in variants]
    each = zip(*all_said, strict=True)
    return max(max(said) - min(said) for said in each)


FOUR = {"bits": 4, "group_size": GROUP}
Quantise = Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]
KINDS: dict[str, tuple[Quantise, dict[str, Any]]] = {
    "gptq": (gptq, {**FOUR, "quant_method": "gptq", "sym": True, "desc_act": False}),
    "awq": (
        awq,
        {**FOUR, "quant_method": "awq", "zero_point": True, "version": "gemm"},
    ),
    "int8": (eight_bits(127, lambda w: w.round().to(torch.int8)), compressed("int")),
    "fp8": (
        eight_bits(448, lambda w: w.to(torch.float8_e4m3fn)),
        compressed("float"),
    ),
}


def save_quantised(family: str, kind: str, path: Path) -> Any:
    """Save the family's model with its layers' matrices quantised.

    Returns:
        the Hugging Face model with the weights that they stand for, bfloat16 values,
        and with inputs of the layers rounded where the format does so.
    """
    quantise, config = KINDS[kind]
    model = copy.deepcopy(models.build(family))
    tensors: Tensors = {}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "layers." not in name or weight.dim() == 1:
                weight.copy_(weight.bfloat16())
                tensors[name] = weight.detach().bfloat16()
                continue
            stored, meant = quantise(weight.detach())
            weight.copy_(meant)
            owner = name.removesuffix("weight")
            tensors |= {f"{owner}{part}": value for part, value in stored.items()}
    if kind in ROUND:
        round_inputs(model, ROUND[kind])
    models.build(family).save_pretrained(path)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((path / "config.json").read_text())
    values["quantization_config"] = config
    (path / "config.json").write_text(json.dumps(values))
    return model


TOLERANCE = 6e-2
# fp8 has three bits after the point: where bfloat16 rounds to the other side, an input
# of a layer may become another one, 1/16 away. So requests differ in how far rounding
# alone takes them, and the oracle says how far: see `unsettled`.
SEEDS = {"fp8": 4}


def check_quantised(
    kind: str, tmp_path: Path, of: Case = CASES["llama"], **options: Any
) -> None:
    """Every point of the quantised tiny Llama is as Hugging Face has it."""
    case = dataclasses.replace(of, options=(*of.options, *BFLOAT16))
    path = tmp_path / "llama-0"  # where `engine` looks
    model = save_quantised("llama", kind, path)
    modules = site_modules(case)
    asked = requests(case, modules)
    prompts = [prompt(at, 4 + at % 5) for at in range(len(asked))]
    sampling = [params(MAX_TOKENS, **specs(*asks)) for asks in asked]
    paths = modules.save(tmp_path / "modules")
    with engine("llama", tmp_path, paths, **{**dict(case.options), **options}) as llm:
        assert llm.llm_engine.vllm_config.quant_config is not None
        found = generate(llm, prompts, sampling)
        assert steered_classes(llm) == case.classes
    others = [unsettled(model, seed) for seed in range(SEEDS.get(kind, 0))]
    seen = 0
    for ids, asks, result in zip(prompts, asked, found, strict=True):
        edits, tolerance = modules.edits(*asks), TOLERANCE
        if others:
            own = spread([model, *others], ids, edits, result.tokens)
            tolerance = max(tolerance, 2 * own)
        wrong = departs(model, result, ids, edits, tolerance)
        assert wrong is None, f"{kind} {asks}: {wrong}, {tolerance} allowed"
        plain = follow(model, ids, {}, result.tokens).logprobs
        moved = [abs(a - b) for a, b in zip(plain, result.logprobs, strict=True)]
        assert not asks or max(moved) > 1e-3, f"nothing was steered: {asks}"
        seen += max(moved) > tolerance
    # Steering shows: a request without it would not pass for most of the others.
    assert seen > 0.8 * len(asked)
