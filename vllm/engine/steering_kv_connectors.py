# SPDX-License-Identifier: Apache-2.0
"""KV connectors that know steered KV from plain KV.

A connector hands the keys and values of one request to another, or to another engine.
That is right only where its keys contain vLLM's block hashes, because those contain
the steering digest. A connector that keys by token ids, or trusts a client to name the
blocks, gives steered KV to plain requests and the reverse.
"""

from __future__ import annotations

from vllm.config import KVTransferConfig

# Read in vLLM 0.32: each looks blocks up by `Request.block_hashes`.
BLOCK_HASH_CONNECTORS = (
    "MooncakeStoreConnector",
    "OffloadingConnector",
    "SimpleCPUOffloadConnector",
)
MULTI_CONNECTOR = "MultiConnector"


def unsafe_kv_connector(config: KVTransferConfig | None) -> str | None:
    """The first connector that does not key by block hash; None: there is none.

    The children of a `MultiConnector` are looked at too. A class from
    `kv_connector_module_path` is not known here, whatever its name.
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
