# SPDX-License-Identifier: Apache-2.0
"""Every front-end seam binds on the installed vLLM and passes stock through."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys

import pytest

import vllm
import vllm.plugins.steering as plugin
from vllm.plugins.steering import seam
from vllm.plugins.steering.engine import arg_utils
from vllm.plugins.steering.front_end import SEAMS
from vllm.plugins.steering.lazy import when_imported
from vllm.plugins.steering.seam import BOUND, SeamError, check_signature, resolve
from vllm.plugins.steering.v1.core import kv_cache_utils

# Not in every supported release.
SOMETIMES = {"vllm.entrypoints.generate.structured_decisions.protocol"}


MODULES = sorted(
    module
    for module in {module for module, _ in SEAMS}
    if module not in SOMETIMES or importlib.util.find_spec(module.rpartition(".")[0])
)
# An optional distribution; without it vLLM does not serve the route.
OPTIONAL = {"vllm.entrypoints.cohere.protocol": "cohere"}


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    plugin.install_front_end_seams()
    for module in MODULES:
        needs = OPTIONAL.get(module)
        if needs is None or importlib.util.find_spec(needs):
            importlib.import_module(module)


@pytest.mark.parametrize("module", MODULES)
def test_every_seam_binds_on_this_vllm(module: str) -> None:
    needs = OPTIONAL.get(module)
    if needs is not None and importlib.util.find_spec(needs) is None:
        pytest.skip(f"{needs} is not installed")
    assert any(target.startswith(f"{module}:") for target in BOUND)


def test_the_installed_vllm_is_supported() -> None:
    assert seam.vllm_is_supported()


def test_installing_again_wraps_nothing_twice() -> None:
    before = {
        target: resolve(target)[2] for target in BOUND if "model_fields" not in target
    }
    plugin.install_front_end_seams()
    assert before == {target: resolve(target)[2] for target in before}


def test_a_wrong_signature_names_symbol_and_versions() -> None:
    with pytest.raises(SeamError) as caught:
        check_signature("a.b:c", lambda x: x, ("self", "y"))
    for part in ("a.b:c", vllm.__version__, seam.SUPPORTED_VLLM, "'y'", "'x'"):
        assert part in str(caught.value)


def test_a_missing_symbol_names_symbol_and_versions() -> None:
    with pytest.raises(SeamError) as caught:
        resolve("vllm.v1.engine.core:EngineCore.no_such_method")
    for part in ("no_such_method", vllm.__version__, seam.SUPPORTED_VLLM):
        assert part in str(caught.value)


def test_no_loaded_module_holds_the_stock_block_key_function() -> None:
    importlib.import_module("vllm.v1.core.block_pool")
    importlib.import_module("vllm.v1.simple_kv_offload.manager")
    assert kv_cache_utils.holders(BOUND[kv_cache_utils.TARGET]) == []


# Each runs in a fork of a fresh process, so that no import of this one is seen.
PROGRAMS = {
    "imported before": """
import vllm.v1.core.block_pool as pool, vllm.v1.core.kv_cache_utils as utils
stock = pool.generate_block_hash_extra_keys
import vllm.plugins.steering as plugin
plugin.install_front_end_seams()
print(pool.generate_block_hash_extra_keys is utils.generate_block_hash_extra_keys,
      pool.generate_block_hash_extra_keys is not stock)
""",
    "imports": """
import sys, vllm.plugins.steering as plugin
plugin.install_front_end_seams()
print([m for m in ("vllm.v1.engine.core", "vllm.v1.worker.gpu_model_runner",
    "vllm.entrypoints.openai.chat_completion.protocol") if m in sys.modules])
""",
    "hash": """
from vllm.config import VllmConfig
stock = VllmConfig().compute_hash()
import vllm.plugins.steering as plugin
plugin.register()
print(VllmConfig().compute_hash() == stock)
""",
    "unsupported": """
import vllm
vllm.__version__ = "0.99.1"
import vllm.plugins.steering as plugin
plugin.register()
from vllm.plugins.steering.seam import BOUND
from vllm.engine.arg_utils import EngineArgs
print(len(BOUND))
args = EngineArgs.__new__(EngineArgs)
args.additional_config = {"steering": {"modules": {}}}
try:
    args.create_engine_config()
except ValueError as error:
    print(error)
args.additional_config = {}
args.create_logging_config = lambda: print("stock was called") or exit()
args.create_engine_config()
""",
}
# What all of them import, and what takes seconds.
PARENT = """
import json, os, sys
from vllm.config import VllmConfig
for program in json.loads(sys.argv[1]):
    sys.stdout.flush()
    if not os.fork():
        exec(program, {})
        sys.exit()
    _, status = os.wait()
    print("\\0", end="")
    if status:
        sys.exit(1)
"""


@pytest.fixture(scope="module")
def printed() -> dict[str, list[str]]:
    """What each of `PROGRAMS` prints."""
    done = subprocess.run(
        [sys.executable, "-c", PARENT, json.dumps(list(PROGRAMS.values()))],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    texts = done.stdout.split("\0")[:-1]
    return {name: text.splitlines() for name, text in zip(PROGRAMS, texts, strict=True)}


def test_modules_imported_before_the_seam_get_the_replacement_too(
    printed: dict[str, list[str]],
) -> None:
    assert printed["imported before"][-1] == "True True"


def test_registering_imports_neither_server_nor_engine(
    printed: dict[str, list[str]],
) -> None:
    assert printed["imports"][-1] == "[]"


def test_the_config_hash_is_stock_without_steering(
    printed: dict[str, list[str]],
) -> None:
    assert printed["hash"][-1] == "True"


def test_an_unsupported_vllm_is_refused_only_when_steering_is_configured(
    printed: dict[str, list[str]],
) -> None:
    *_, bound, error, stock = printed["unsupported"]
    assert bound == "1"
    assert "0.32" in error
    assert "0.99.1" in error
    assert stock == "stock was called"


def test_an_installer_runs_once_its_module_has_run() -> None:
    name = "vllm.assets.audio"
    sys.modules.pop(name, None)
    seen: list[bool] = []
    when_imported(name, lambda: seen.append(hasattr(sys.modules[name], "AudioAsset")))
    assert seen == []
    importlib.import_module(name)
    importlib.import_module(name)
    assert seen == [True]


def test_the_flag_is_a_class_method_that_subclasses_inherit() -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs

    assert EngineArgs.__module__ == arg_utils.MODULE
    assert AsyncEngineArgs.from_cli_args.__self__ is AsyncEngineArgs
