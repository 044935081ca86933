# SPDX-License-Identifier: Apache-2.0
"""KV connectors that tell steered KV from plain KV.

A connector hands the keys and values of one request to another, or to another engine.
Its keys must contain vLLM's block hashes, because those contain the steering digest. A
connector that keys by token ids, or lets a client name the blocks, gives steered KV to
plain requests, and plain KV to steered ones.
"""

from __future__ import annotations

from vllm.config import KVTransferConfig

# In vLLM 0.32 each of these looks blocks up by `Request.block_hashes`.
BLOCK_HASH_CONNECTORS = (
    "MooncakeStoreConnector",
    "OffloadingConnector",
    "SimpleCPUOffloadConnector",
)
MULTI_CONNECTOR = "MultiConnector"


def unsafe_kv_connector(config: KVTransferConfig | None) -> str | None:
    """The first connector that does not key by block hash, or None.

    The children of a `MultiConnector` are checked too. A class from
    `kv_connector_module_path` counts as unsafe, whatever its name.
    """
    if config is None or config.kv_connector is None:
        return None
    name, path = config.kv_connector, config.kv_connector_module_path
    if path is not None:
        return f"{name} ({path})"
    if name in BLOCK_HASH_CONNECTORS:
        return None
    if name != MULTI_CONNECTOR:
        return name
    for child in config.kv_connector_extra_config.get("connectors", []):
        found = unsafe_kv_connector(KVTransferConfig(**child))
        if found is not None:
            return f"{found} in {MULTI_CONNECTOR}"
    return None
