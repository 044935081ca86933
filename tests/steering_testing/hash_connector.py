# SPDX-License-Identifier: Apache-2.0
"""A KV connector for tests that keys by vLLM's block hashes, as offload ones do.

Stock's example connector writes KV to files whose names are made from token ids. Here
the name also has the hash of the last whole block, which depends on the steering.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.example_connector import (
    ExampleConnector,
    align_to_block_size,
)

if TYPE_CHECKING:
    from vllm.v1.request import Request

NAME = "HashConnector"


@dataclass
class Named:
    """Stands for a multi-modal input, whose identifier stock puts into the name."""

    identifier: str


class HashConnector(ExampleConnector):
    """Stores a prompt's KV under its tokens and the hash of its last whole block."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._keys: dict[str, str] = {}

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        tokens = align_to_block_size(request.num_prompt_tokens - 1, self._block_size)
        blocks = tokens // self._block_size
        assert blocks, "a prompt without a whole block"
        self._keys[request.request_id] = request.block_hashes[blocks - 1].hex()
        return super().get_num_new_matched_tokens(request, num_computed_tokens)

    def _found_match_for_request(self, request: Request) -> bool:
        ids = list(request.prompt_token_ids or [])
        return self._found_match_for_prompt(ids, [self._keys[request.request_id]])

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        output = copy.copy(scheduler_output)
        output.scheduled_new_reqs = [
            replace(new, mm_features=[Named(self._keys[new.req_id])])
            for new in scheduler_output.scheduled_new_reqs
        ]
        return super().build_connector_meta(output)


def register() -> None:
    """Make the connector known to vLLM by its name."""
    if NAME not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(NAME, __name__, NAME)
