# SPDX-License-Identifier: Apache-2.0
"""Change the modules of an engine in this process: notebooks and scripts.

from vllm.entrypoints.steering import register_module
register_module(llm, "gg", "path/to/sae")
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import numpy as np
import torch
from safetensors.torch import save_file

from vllm.config.steering import ModuleInfo, SteeringConfig
from vllm.config.steering_checks import shown
from vllm.config.steering_json import Json
from vllm.config.steering_points import HOOK_NAMES, place_of
from vllm.config.steering_replies import METHOD, ModuleReply, Outcome, as_reply
from vllm.entrypoints.steering.arguments import site_list
from vllm.entrypoints.steering.statuses import HTTP_STATUS

if TYPE_CHECKING:
    from vllm import LLM


LOADING_POLL_S = 0.02
# Files of the modules that are made from tensors, by engine and module.
_KEPT: WeakKeyDictionary[LLM, dict[str, tempfile.TemporaryDirectory[str]]]
_KEPT = WeakKeyDictionary()


@runtime_checkable
class _Engine(Protocol):
    """An `LLM`, as far as it asks its workers."""

    def collective_rpc(self, method: str, *, args: tuple[object, ...]) -> object: ...


class SteeringModuleError(ValueError):
    """The engine refused the change; nothing was changed.

    `status` is the HTTP status that the server's routes answer, `field` the bad field,
    and `in_use` the number of requests that are in the way.
    """

    def __init__(self, reply: ModuleReply):
        super().__init__(reply.error)
        self.status = HTTP_STATUS[reply.outcome]
        self.field = reply.field
        self.in_use = reply.in_use


def register_module(
    llm: LLM,
    name: str,
    path: str | os.PathLike[str],
    *,
    replace: bool = False,
    **options: object,
) -> ModuleInfo:
    """Load a module into a running engine, all or nothing on every rank.

    Args:
        llm: an engine that was started with steering.
        name: what requests call it.
        path: local path, `hf:owner/repo[/sub/path][@revision]` or
            `saelens:RELEASE/SAE_ID[@revision]`.
        replace: take the place of a module of that name.
        options: as in `additional_config.steering.modules`: `feature_units`,
            `skip_token_ids`, `norm_guard`, `reference_norm`, `sites`, `sharding`,
            `screening`.

    Returns:
        The module as the engine has it, with its sites, digest and slots.

    Raises:
        SteeringModuleError: bad module, no free slot that fits, or a name in use.
    """
    path = os.fspath(path) if isinstance(path, os.PathLike) else path
    if options.get("sites") is not None:
        options["sites"] = site_list(options["sites"])
    inspected = _call(llm, "inspect", {"name": name, "path": path, **options})
    payload = {"module": inspected.module, "replace": replace}
    module = ModuleInfo.from_json(_call(llm, "register", payload).module or {})
    _remove_files(llm, name)
    return module


def register_vector(
    llm: LLM,
    name: str,
    vectors: Mapping[str, torch.Tensor | np.ndarray],
    *,
    replace: bool = False,
) -> ModuleInfo:
    """Load tensors of this process as a steering vector module.

    Args:
        llm: an engine that was started with steering, on this machine.
        name: what requests call it.
        vectors: `{"post_block.20": tensor [D]}`, one vector for each site (its name, or
            `(hook, layer)`), in the units of the stream; a tensor of PyTorch or an
            array of NumPy.
        replace: take the place of a module of that name.

    Raises:
        ValueError: `vectors` is no mapping of sites to tensors.
        SteeringModuleError: bad tensor or site, no free slot that fits, or a name in
            use.
    """
    stored = _by_site(vectors)
    # The engine reads the file whenever it loads weights, so it stays with the module.
    folder = tempfile.TemporaryDirectory(prefix="vllm-steering-vector-")
    try:
        path = f"{folder.name}/vectors.safetensors"
        save_file(stored, path)
        module = register_module(llm, name, path, replace=replace)
    except BaseException:
        folder.cleanup()
        raise
    _KEPT.setdefault(llm, {})[name] = folder
    return module


def _remove_files(llm: LLM, name: str) -> None:
    """Remove the files of a module that is gone, if it was made from tensors."""
    folder = _KEPT.get(llm, {}).pop(name, None)
    if folder is not None:
        folder.cleanup()


def _by_site(vectors: object) -> dict[str, torch.Tensor]:
    """The vectors as a file holds them: by the name of the site, in float32."""
    if not isinstance(vectors, Mapping):
        raise ValueError(
            f"vectors: found {shown(vectors)}, expected sites and their tensors, such "
            'as {"post_block.20": tensor}'
        )
    stored = {}
    for site, tensor in vectors.items():
        found = place_of(site)
        if found is None:
            raise ValueError(
                f"vectors: found the site {shown(site)}, expected HOOK.LAYER such as "
                f"post_block.20, with one of {HOOK_NAMES}"
            )
        if isinstance(tensor, np.ndarray) and tensor.dtype.kind in "fiu":
            tensor = torch.from_numpy(tensor.astype(np.float32))
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(
                f"vectors.{site}: found {shown(tensor)}, expected a tensor [D]"
            )
        key = f"layers.{found[0]}.{found[1].value}"
        stored[key] = tensor.detach().float().cpu().contiguous().clone()
    return stored


def replace_module(
    llm: LLM, name: str, path: str | os.PathLike[str], **options: object
) -> ModuleInfo:
    """`register_module` in the place of a module of the same name, if there is one.

    Raises:
        SteeringModuleError: as `register_module`, or requests use the old module.
    """
    return register_module(llm, name, path, replace=True, **options)


def unregister_module(llm: LLM, name: str) -> None:
    """Remove a module; its slots are free.

    Raises:
        SteeringModuleError: no such module, or requests name it.
    """
    _call(llm, "unregister", {"name": name})
    _remove_files(llm, name)


def put_preset(llm: LLM, name: str, preset: Json) -> None:
    """Make a preset, or replace one.

    Args:
        llm: an engine that was started with steering.
        name: 1 to 128 letters, digits, `.`, `_` or `-`.
        preset: the spec fields of a request, `sampling`, `description` and `locked`.

    Raises:
        SteeringModuleError: it is not valid on this engine.
    """
    _call(llm, "put_preset", {"name": name, "preset": preset})


def delete_preset(llm: LLM, name: str) -> None:
    """Remove a preset.

    Raises:
        SteeringModuleError: no such preset, or it is the default one.
    """
    _call(llm, "delete_preset", {"name": name})


def set_default_preset(llm: LLM, name: str | None) -> None:
    """Apply a preset to every request that names none; None ends that.

    Raises:
        SteeringModuleError: no such preset, or it is not valid now.
    """
    _call(llm, "set_default_preset", {"name": name})


def list_modules(llm: LLM) -> dict[str, ModuleInfo]:
    """The engine's modules by name, in the order of registration."""
    config = engine_config(llm)
    return {} if config is None else config.modules


def engine_config(llm: LLM) -> SteeringConfig | None:
    """The engine's steering configuration as it is now; None without steering."""
    config = _call(llm, "list", {}).config
    return None if config is None else SteeringConfig.from_json(config)


def _call(llm: LLM, action: str, payload: Json) -> ModuleReply:
    given: object = llm
    if not isinstance(given, _Engine):
        raise ValueError(f"llm: found {shown(llm)}, expected a vllm.LLM")
    while True:
        (answer,) = llm.collective_rpc(METHOD, args=(action, payload))
        reply = as_reply(answer)
        if reply.outcome is not Outcome.LOADING:
            break
        time.sleep(LOADING_POLL_S)
    if reply.outcome is not Outcome.DONE:
        raise SteeringModuleError(reply)
    return reply
