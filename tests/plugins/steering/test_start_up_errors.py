# SPDX-License-Identifier: Apache-2.0
"""A start-up mistake is one line at the end, whichever process found it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import vllm.plugins.steering as plugin
from tests.plugins.steering.conftest import write_sae
from vllm.config.steering_checks import SteeringConfigError
from vllm.config.steering_environment import DIRECTORY_ENV, KEY_ENV
from vllm.engine.arg_utils import EngineArgs

pytestmark = pytest.mark.engine

CODE = """
import json, sys
from vllm import LLM
LLM(sys.argv[1], skip_tokenizer_init=True, enforce_eager=True, max_model_len=64,
    dtype="float32", tensor_parallel_size=int(sys.argv[3]),
    additional_config=json.loads(sys.argv[2]))
"""


def with_nan(path: Path) -> Path:
    """An SAE that is found to be bad only when a worker loads it."""
    write_sae(path)
    file = path / "sae_weights.safetensors"
    tensors = load_file(file)
    tensors["W_enc"][3, 5] = torch.nan
    save_file(tensors, file)
    return path


def last_line(model: Path, steering: dict[str, Any], ranks: int = 1) -> str:
    """The last line of the traceback of a program that cannot start its engine."""
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    given = json.dumps({"steering": steering})
    ended = subprocess.run(
        [sys.executable, "-c", CODE, str(model), given, str(ranks)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert ended.returncode != 0
    before, _, traceback = ended.stderr.rpartition("Traceback (most recent call last)")
    assert "the above exception" not in before[-200:].lower(), "tracebacks are chained"
    # After the traceback, Python may warn about what an ended worker has left.
    return next(line for line in traceback.splitlines()[1:] if not line[:1].isspace())


@pytest.mark.parametrize(
    ("ranks", "sharding"),
    [
        (1, "auto"),
        pytest.param(2, "auto", marks=pytest.mark.slow),
        # The row with the NaN is the first rank's, and the second does not read it.
        pytest.param(2, "shard", marks=pytest.mark.slow),
    ],
)
def test_what_a_worker_finds_is_the_last_line(
    model_path: Path, tmp_path: Path, ranks: int, sharding: str
) -> None:
    bad = with_nan(tmp_path / "nan")
    module = {"path": str(bad), "sharding": sharding}
    line = last_line(model_path, {"modules": {"sea": module}}, ranks)
    assert line.startswith("vllm.config.steering_checks.SteeringConfigError: ")
    for part in ("'sea'", str(bad), "W_enc", "NaN"):
        assert part in line


def test_what_the_front_end_finds_is_the_last_line(model_path: Path) -> None:
    line = last_line(model_path, {"modules": {"sea": "/nope"}})
    assert line.startswith("vllm.config.steering_checks.SteeringConfigError: ")
    for part in ("'sea'", "/nope", "no such file"):
        assert part in line


def refusal(model: Path, modules: dict[str, Any]) -> str:
    """What the front end says of these modules, in one line and without a cause."""
    plugin.register()
    arguments = EngineArgs(
        str(model),
        skip_tokenizer_init=True,
        additional_config={"steering": {"modules": modules}},
    )
    with pytest.raises(SteeringConfigError) as caught:
        arguments.create_engine_config()
    error = caught.value
    assert error.__cause__ is None
    assert error.__context__ is None or error.__suppress_context__
    assert "\n" not in str(error)
    return str(error)


def test_a_path_that_is_none_is_refused_by_its_field(model_path: Path) -> None:
    said = refusal(model_path, {"sea": 3})
    assert said.startswith("additional_config.steering.modules.sea: found 3")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("v.safetensors", b"", "v.safetensors"),
        (
            "v.safetensors",
            b"version https://git-lfs.github.com/spec/v1",
            "git lfs pull",
        ),
        ("v.gguf", b"GGUF\3\0\0\0" + b"\xff" * 16, "declares"),
        ("v.npy", b"\x93NUMPY\1\0\xff\xff{", "v.npy"),
        ("v.pt", b"\x80\2cos\nsystem\n(X\1\0\0\0xtR.", "v.pt"),
    ],
)
def test_a_file_that_is_no_module_is_refused_in_one_line(
    model_path: Path, tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    (tmp_path / name).write_bytes(content)
    found = refusal(model_path, {"m": str(tmp_path / name)})
    assert "'m'" in found and said in found


@pytest.mark.parametrize("name", [KEY_ENV, DIRECTORY_ENV])
def test_our_variables_pass_the_environment_check(
    model_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    plugin.register()
    # vLLM's CPU worker sets a variable that vLLM does not know.
    for left in ("VLLM_DIST_IDENT", KEY_ENV, DIRECTORY_ENV):
        monkeypatch.delenv(left, raising=False)
    monkeypatch.setenv(name, "secret")
    arguments = EngineArgs(
        str(model_path), skip_tokenizer_init=True, fail_on_environ_validation=True
    )
    arguments.create_engine_config()
    monkeypatch.setenv("VLLM_STEERING_NO_SUCH", "1")
    with pytest.raises(ValueError, match="VLLM_STEERING_NO_SUCH"):
        arguments.create_engine_config()


def test_the_key_is_no_part_of_the_compile_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm.envs import compile_factors

    plugin.register()
    monkeypatch.setenv(KEY_ENV, "secret")
    assert "secret" not in map(str, compile_factors().values())
