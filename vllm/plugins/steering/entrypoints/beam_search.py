# SPDX-License-Identifier: Apache-2.0
"""Seams into `vllm.entrypoints.generate.beam_search`: beams are never steered.

A beam is a request of its own whose prompt contains what was generated, so a preset
would steer those tokens as prompt. The edits a branch would make: the sampling
parameters of online beams opt out of the server's default preset, because the request
has opted out of it, or the default has come while its beams run. `LLM.beam_search` has
no way to opt out, and refuses a default preset.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.config.sae_steering_specs import PRESET_KEY
from vllm.config.steering_checks import refusal
from vllm.engine.steering_active_config import active_steering_config
from vllm.plugins.steering.seam import BOUND, Signatures, Stock, resolve, wrap

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.sampling_params import SamplingParams

ONLINE = "vllm.entrypoints.generate.beam_search.online"
OFFLINE = "vllm.entrypoints.generate.beam_search.offline"
_OFFLINE = (
    *("self", "prompts", "params"),
    *("lora_request", "use_tqdm", "concurrency_limit"),
)
PARAMETERS: Signatures = [_OFFLINE, (*_OFFLINE, "priority")]  # the latter since 0.33


def install_online() -> None:
    """Replace the name by which the module makes the parameters of beams."""
    target = f"{ONLINE}:SamplingParams"
    if target not in BOUND:
        owner, name, stock = resolve(target)
        setattr(owner, name, _unsteered(stock))
        BOUND[target] = stock


def install_offline() -> None:
    """Refuse a default preset before a beam is made."""
    wrap(f"{OFFLINE}:BeamSearchOfflineMixin.beam_search", PARAMETERS, _make_offline)


def _unsteered(stock: Stock) -> Stock:
    def make(*args: object, **kwargs: object) -> SamplingParams:
        params: SamplingParams = stock(*args, **kwargs)
        params.extra_args = {**(params.extra_args or {}), PRESET_KEY: None}
        return params

    return make


def _make_offline(stock: Stock) -> Stock:
    def beam_search(self: LLM, *args: object, **kwargs: object) -> object:
        config = active_steering_config(self.llm_engine.vllm_config)
        if config is not None and config.default_preset is not None:
            raise refusal(
                "default_preset",
                "beam search does not support steering, expected no default preset: "
                "set_default_preset(llm, None)",
            )
        return stock(self, *args, **kwargs)

    return beam_search
