# SPDX-License-Identifier: Apache-2.0
"""Start-up: the sites at which requests may bring vectors, by flag and by option."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import vllm.plugins.steering as plugin
from vllm.config.steering import SteeringConfig, get_steering_config
from vllm.config.steering_checks import SteeringConfigError
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.plugins.steering.seam import BOUND
from vllm.utils.argparse_utils import FlexibleArgumentParser

FLAG = "--steering-inline-vectors"


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    plugin.install_front_end_seams()


def parser() -> FlexibleArgumentParser:
    return AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())


def test_the_flag_reserves_room_for_every_request_of_the_batch(
    model_path: Path,
) -> None:
    argv = [FLAG, "post_block.0=2", "resid_pre.1=1", "--max-num-seqs", "7"]
    argv = ["--model", str(model_path), "--skip-tokenizer-init", *argv]
    made = AsyncEngineArgs.from_cli_args(parser().parse_args(argv))
    config = get_steering_config(made.create_engine_config().additional_config)
    assert config is not None
    first, second = config.inline_sites
    assert (first.name, first.per_request, first.directions) == ("post_block.0", 2, 14)
    assert (second.name, second.per_request, second.directions) == ("pre_attn.1", 1, 7)
    assert SteeringConfig.from_json(config.to_json()) == config


def test_a_process_without_the_plugin_finds_what_the_flags_say(
    model_path: Path,
) -> None:
    """Of several API servers, each reads the arguments before it loads plugins."""
    argv = ["--model", str(model_path), FLAG, "post_block.0=2"]
    args = parser().parse_args(argv)
    made = AsyncEngineArgs.from_cli_args(args)
    stock = BOUND["vllm.engine.arg_utils:EngineArgs.from_cli_args"]
    unpatched = stock.__func__(AsyncEngineArgs, args)  # type: ignore[attr-defined]
    again = AsyncEngineArgs.from_cli_args(args)
    for other in (unpatched, again):
        assert other.additional_config == made.additional_config
    assert made.additional_config["steering"]["inline_vectors"] == {"post_block.0": 2}


@pytest.mark.parametrize("bad", ["post_block.0", "=1", "post_block.0=x", "a=1 a=2"])
def test_what_is_no_site_and_count_is_refused(bad: str) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args([FLAG, *bad.split()])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (3, "inline_vectors: found 3"),
        ({"nowhere.0": 1}, "inline_vectors: found the site 'nowhere.0'"),
        ({"post_block.99": 1}, "0..2"),
        ({"post_block.0": 0}, "inline_vectors.post_block.0: found 0"),
        ({"post_block.0": True}, "inline_vectors.post_block.0: found True"),
        ({"post_block.0": 65}, "1..64"),
        ({"post_block.0": 1, "0.resid_post": 1}, "given twice"),
    ],
)
def test_a_wrong_option_is_refused_by_its_path(
    model_path: Path, given: Any, words: str
) -> None:
    args = EngineArgs(
        str(model_path),
        skip_tokenizer_init=True,
        additional_config={"steering": {"inline_vectors": given}},
    )
    with pytest.raises(SteeringConfigError, match="inline_vectors") as caught:
        args.create_engine_config()
    assert words in str(caught.value)


def test_no_module_takes_the_name_of_an_inline_vector(model_path: Path) -> None:
    args = EngineArgs(
        str(model_path),
        skip_tokenizer_init=True,
        additional_config={"steering": {"modules": {"inline:x": "p"}}},
    )
    with pytest.raises(SteeringConfigError, match="does not begin with"):
        args.create_engine_config()
