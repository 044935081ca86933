# SPDX-License-Identifier: Apache-2.0
"""Seam into `vllm.entrypoints.launchers.app`: bodies of requests have limits.

The edit a branch would make: `init_entrypoints_middleware` also adds `BodyLimit` and
`UnicodeBodies`, which run after the middlewares that authenticate, and
`init_exception_handler` the handlers of `nested_bodies`. Without steering there is no
limit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.engine.steering_active_config import max_body_bytes
from vllm.plugins.steering.seam import Stock, wrap

if TYPE_CHECKING:
    from argparse import Namespace

    from fastapi import FastAPI

MODULE = "vllm.entrypoints.launchers.app"


def install() -> None:
    """Add the limit where vLLM adds its middlewares."""
    wrap(
        f"{MODULE}:init_entrypoints_middleware",
        ("args", "app", "supported_tasks"),
        _make_init_entrypoints_middleware,
    )


def _make_init_entrypoints_middleware(stock: Stock) -> Stock:
    from vllm.entrypoints.openai.steering.body_limit import BodyLimit
    from vllm.entrypoints.openai.steering.nested_bodies import refuse_nested_bodies
    from vllm.entrypoints.openai.steering.unicode_bodies import UnicodeBodies

    def init_entrypoints_middleware(
        args: Namespace, app: FastAPI, supported_tasks: tuple[str, ...]
    ) -> None:
        def is_on() -> bool:
            return _limit_of(app) is not None

        app.add_middleware(UnicodeBodies, is_on=is_on)
        app.add_middleware(BodyLimit, most=lambda: _limit_of(app))
        refuse_nested_bodies(app, is_on)
        stock(args, app, supported_tasks)

    return init_entrypoints_middleware


def _limit_of(app: FastAPI) -> int | None:
    """The limit of an application's engine; None for one that has no engine yet."""
    try:
        return max_body_bytes(app.state.vllm_config)
    except AttributeError:
        return None
