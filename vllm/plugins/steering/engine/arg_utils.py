# SPDX-License-Identifier: Apache-2.0
"""Seam into `vllm.engine.arg_utils`: steering modules at start-up.

The edits a branch would make: `EngineArgs.add_cli_args` declares
`--steering-modules`; `EngineArgs.from_cli_args` folds it into `additional_config`;
`EngineArgs.create_engine_config` ends with `resolve_steering(config)`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import vllm
from vllm.config.steering_checks import SteeringConfigError, shown
from vllm.config.steering_json import Json
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
FLAG = "--steering-modules"
PRESETS_FLAG = "--steering-presets"
INLINE_FLAG = "--steering-inline-vectors"
KEY_FLAG = "--steering-api-key"


class Secret(str):
    """A string that logs do not show: vLLM logs the arguments it was started with."""

    def __repr__(self) -> str:
        return "'***'"


def install() -> None:
    """Declare the flag, fold it into `additional_config`, resolve the modules."""
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
                f"steering is configured, but it supports vLLM {SUPPORTED_VLLM} and "
                f"this is vLLM {vllm.__version__}"
            )
        return stock(self, *args, **kwargs)

    return create_engine_config


class SteeringModulesAction(argparse.Action):
    """Collects `NAME=PATH` and JSON objects with `name` and `path`."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[object] | None,
        option_string: str | None = None,
    ) -> None:
        options = vars(namespace)
        modules = dict(options[self.dest] or {})
        for item in values or ():
            try:
                name, given = parse_module(str(item))
            except ValueError as error:
                parser.error(f"{option_string or FLAG}: {error}")
            if name in modules:
                parser.error(
                    f"{option_string or FLAG}: module {shown(name)} is given twice"
                )
            modules[name] = given
        options[self.dest] = modules


class InlineVectorsAction(argparse.Action):
    """Collects `SITE=COUNT`."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[object] | None,
        option_string: str | None = None,
    ) -> None:
        options = vars(namespace)
        sites = dict(options[self.dest] or {})
        for item in values or ():
            site, _, count = str(item).partition("=")
            if not site or not (count.isascii() and count.isdigit()):
                parser.error(f"{INLINE_FLAG}: found {shown(item)}, expected SITE=COUNT")
            if site in sites:
                parser.error(f"{INLINE_FLAG}: site {shown(site)} is given twice")
            sites[site] = int(count)
        options[self.dest] = sites


def parse_module(item: str) -> tuple[str, str | Json]:
    """`NAME=PATH`, or a JSON object, as name and form for `additional_config`.

    Raises:
        ValueError: it is neither.
    """
    if item.lstrip().startswith("{"):
        try:
            given = json.loads(item)
        except json.JSONDecodeError as error:
            raise ValueError(f"found {shown(item)}, not valid JSON: {error}") from None
        name = given.pop("name", None)
        if type(name) is not str or not name:
            raise ValueError(f'found {shown(item)}, expected a "name" in the object')
        return name, given
    name, separator, path = item.partition("=")
    if not (separator and name and path):
        raise ValueError(
            f"found {shown(item)}, expected NAME=PATH or a JSON object "
            '{"name": ..., "path": ...}'
        )
    return name, path


def fold_modules(
    additional_config: Json | None,
    modules: Json | None,
    section: str = "modules",
    flag: str = FLAG,
) -> Json:
    """`additional_config` with a flag's modules added; the input is not changed.

    Args:
        additional_config: as given.
        modules: what the flag says.
        section: `modules`, `presets` or `inline_vectors`.
        flag: its name.

    Raises:
        SteeringConfigError: a name is given in both places.
    """
    additional = dict(additional_config or {})
    if not modules:
        return additional
    steering = dict(additional.get("steering") or {})
    given = dict(steering.get(section) or {})
    for name in modules:
        if name in given:
            raise SteeringConfigError(
                f"steering.{section}: {shown(name)} is given by {flag} and "
                "in additional_config, expected one of them"
            )
    steering[section] = {**given, **modules}
    return {**additional, "steering": steering}


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
        group = parser.add_argument_group(
            title="SteeringConfig", description="SAE steering modules."
        )
        group.add_argument(
            FLAG,
            nargs="+",
            action=SteeringModulesAction,
            default=None,
            metavar="NAME=PATH",
            help="Steering modules to load at start-up, each as NAME=PATH or as a "
            'JSON object {"name": ..., "path": ..., "feature_units": ..., '
            '"skip_token_ids": ..., "norm_guard": ...}. PATH is a local path or '
            "hf:owner/repo[/sub/path][@revision].",
        )
        group.add_argument(
            PRESETS_FLAG,
            nargs="+",
            action=SteeringModulesAction,
            default=None,
            metavar="NAME=FILE",
            help="Presets to start with: JSON files with the steering fields of a "
            "request, and optionally sampling, description and locked. Clients choose "
            "one as model or as steering_preset.",
        )
        group.add_argument(
            INLINE_FLAG,
            nargs="+",
            action=InlineVectorsAction,
            default=None,
            metavar="SITE=COUNT",
            help="Sites at which requests may bring steering vectors of their own, "
            "such as post_block.20=4: at most so many different ones a request. Room "
            "for all requests of a batch is reserved at start-up.",
        )
        group.add_argument(
            KEY_FLAG,
            type=Secret,
            default=None,
            metavar="KEY",
            help="Bearer key of the routes that change steering modules, which exist "
            "when VLLM_PLUGINS names steering. VLLM_STEERING_API_KEY does the same; "
            "without a key modules cannot change over HTTP.",
        )
        return parser

    return add_cli_args


def _make_from_cli_args(stock: Stock) -> Stock:
    def from_cli_args(cls: type[EngineArgs], args: argparse.Namespace) -> EngineArgs:
        engine_args = stock(cls, args)
        # A program that makes its own parser may not know the flag.
        for dest, section, flag in (
            ("steering_modules", "modules", FLAG),
            ("steering_presets", "presets", PRESETS_FLAG),
            ("steering_inline_vectors", "inline_vectors", INLINE_FLAG),
        ):
            if given := vars(args).get(dest):
                engine_args.additional_config = fold_modules(
                    engine_args.additional_config, given, section, flag
                )
        return engine_args

    return from_cli_args
