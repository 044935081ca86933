# SPDX-License-Identifier: Apache-2.0
"""Seam into `vllm.engine.arg_utils`: steering at start-up.

The edits a branch would make: `EngineArgs.add_cli_args` ends with `add_options`,
`EngineArgs.from_cli_args` with `fold_options`, which fills `additional_config`, and
`EngineArgs.create_engine_config` with `resolve_steering(config)`.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import vllm
from vllm.config.steering_checks import SteeringConfigError
from vllm.engine.steering_args import FOLDED, add_options, fold_options
from vllm.engine.steering_resolution import resolve_steering
from vllm.plugins.steering.seam import (
    BOUND,
    SUPPORTED_VLLM,
    Stock,
    replace_unchecked,
    wrap,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs

MODULE = "vllm.engine.arg_utils"
CREATE_ENGINE_CONFIG = f"{MODULE}:EngineArgs.create_engine_config"


def install() -> None:
    """Declare the options, fold them into `additional_config`, resolve the modules."""
    wrap(
        CREATE_ENGINE_CONFIG,
        ("self", "usage_context", "headless"),
        _make_create_engine_config,
    )
    args = f"{MODULE}:EngineArgs"
    wrap(f"{args}.add_cli_args", ("parser",), _make_add_cli_args, staticmethod)
    wrap(f"{args}.from_cli_args", ("args",), _make_from_cli_args, classmethod)


def install_version_guard() -> None:
    """On an unsupported vLLM: refuse to start with steering, change nothing else."""
    if CREATE_ENGINE_CONFIG not in BOUND:
        replace_unchecked(CREATE_ENGINE_CONFIG, _make_version_guard)


def _make_version_guard(stock: Stock) -> Stock:
    def create_engine_config(
        self: EngineArgs, *args: object, **kwargs: object
    ) -> VllmConfig:
        additional = self.additional_config
        if isinstance(additional, dict) and additional.get("steering") is not None:
            raise SteeringConfigError(
                f"steering is configured, but vLLM {vllm.__version__} is not "
                f"supported, expected vLLM {SUPPORTED_VLLM}"
            )
        return stock(self, *args, **kwargs)

    return create_engine_config


def _make_create_engine_config(stock: Stock) -> Stock:
    def create_engine_config(
        self: EngineArgs, usage_context: object = None, headless: bool = False
    ) -> VllmConfig:
        config = stock(self, usage_context, headless)
        resolve_steering(config)
        return config

    return create_engine_config


def _make_add_cli_args(stock: Stock) -> Stock:
    def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = stock(parser)
        add_options(parser)
        return parser

    return add_cli_args


def _make_from_cli_args(stock: Stock) -> Stock:
    def from_cli_args(cls: type[EngineArgs], args: argparse.Namespace) -> EngineArgs:
        engine_args = stock(cls, args)
        options = vars(args)
        engine_args.additional_config = fold_options(
            engine_args.additional_config, options
        )
        # The processes of several API servers are given these arguments, and read them
        # before this plugin is loaded.
        options["additional_config"] = engine_args.additional_config
        options.update(dict.fromkeys(FOLDED & set(options)))
        return engine_args

    return from_cli_args
