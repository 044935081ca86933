# SPDX-License-Identifier: Apache-2.0
"""Seam into `vllm.v1.engine.core`: the engine checks steering again at admission.

The edit a branch would make: `preprocess_add_request` begins with the lines below.
An error there concerns one request only, so a client that talks to the engine
directly cannot make a worker raise. The digests must be in place before the stock
function builds the `Request`, which hashes its prompt's blocks at once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from vllm.config.sae_steering_admission import ROWS_KEY, admitted_extra_args
from vllm.config.sae_steering_specs import EXTRA_ARGS_KEYS
from vllm.plugins.steering.active import active_steering_config
from vllm.plugins.steering.seam import wrap

MODULE = "vllm.v1.engine.core"
_OURS = (*EXTRA_ARGS_KEYS, ROWS_KEY)


def install() -> None:
    """Admit steering before the engine builds a request."""
    wrap(
        f"{MODULE}:EngineCore.preprocess_add_request",
        ("self", "request"),
        _make_preprocess_add_request,
    )


def _make_preprocess_add_request(stock: Callable[..., Any]) -> Callable[..., Any]:
    def preprocess_add_request(self: Any, request: Any) -> Any:
        params = request.sampling_params
        if params is not None and params.extra_args:
            args = params.extra_args
            if any(key in args for key in _OURS):
                # In-process clients share the object between the n requests of a
                # prompt, so the engine writes into its own copy.
                params = copy.copy(params)
                params.extra_args = admitted_extra_args(
                    args, active_steering_config(self.vllm_config), request.resumable
                )
                request.sampling_params = params
        return stock(self, request)

    return preprocess_add_request
