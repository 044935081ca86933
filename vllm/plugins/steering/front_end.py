# SPDX-License-Identifier: Apache-2.0
"""The front-end seams: which stock module each waits for."""

from __future__ import annotations

from collections.abc import Callable

from vllm.plugins.steering import outputs
from vllm.plugins.steering.engine import arg_utils
from vllm.plugins.steering.entrypoints import (
    app,
    beam_search,
    carrying_routes,
    reading_limits,
    reading_routes,
    refusing_routes,
    serving,
)
from vllm.plugins.steering.platforms import interface
from vllm.plugins.steering.v1.core import kv_cache_utils
from vllm.plugins.steering.v1.core.sched import scheduler
from vllm.plugins.steering.v1.engine import (
    core,
    core_client,
    input_processor,
    output_processor,
    utils,
)

SEAMS: tuple[tuple[str, Callable[[], None]], ...] = (
    (arg_utils.MODULE, arg_utils.install),
    (input_processor.MODULE, input_processor.install),
    (core.MODULE, core.install),
    (core_client.MODULE, core_client.install),
    (output_processor.MODULE, output_processor.install),
    (utils.MODULE, utils.install),
    (interface.MODULE, interface.install),
    (outputs.MODULE, outputs.install),
    (scheduler.MODULE, scheduler.install),
    (kv_cache_utils.MODULE, kv_cache_utils.install),
    (app.MODULE, app.install),
    (carrying_routes.COMPLETION, carrying_routes.install_completion),
    (carrying_routes.CHAT, carrying_routes.install_chat_completion),
    (carrying_routes.RESPONSES, carrying_routes.install_responses),
    (beam_search.ONLINE, beam_search.install_online),
    (beam_search.OFFLINE, beam_search.install_offline),
    *reading_routes.SEAMS,
    *reading_limits.SEAMS,
    *((installer.module, installer) for installer in serving.INSTALLERS),
    *refusing_routes.installers(),
)
