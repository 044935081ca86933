# SPDX-License-Identifier: Apache-2.0
"""The command-line options of steering, and what they add to `additional_config`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import get_args

from vllm.config.steering import DecoderLayers
from vllm.config.steering_checks import SteeringConfigError, shown
from vllm.config.steering_json import Json

FLAG = "--steering-modules"
PRESETS_FLAG = "--steering-presets"
INLINE_FLAG = "--steering-inline-vectors"
DECODER_FLAG = "--steering-decoder-layer"
KEY_FLAG = "--steering-api-key"
# Where each option goes: a section of `additional_config["steering"]`.
SECTIONS = {
    FLAG: "modules",
    PRESETS_FLAG: "presets",
    INLINE_FLAG: "inline_vectors",
}
# What `fold_options` reads, as a parser names it.
FOLDED = {
    flag.removeprefix("--").replace("-", "_") for flag in (*SECTIONS, DECODER_FLAG)
}


class Secret(str):
    """A string that logs do not show: vLLM logs the arguments it was started with."""

    def __repr__(self) -> str:
        return "'***'"


class SteeringModulesAction(argparse.Action):
    """Collects `NAME=PATH` and JSON objects with `name` and `path`."""

    noun = "module"

    def parse(self, item: str) -> tuple[str, object]:
        """One item as name and value; raises ValueError."""
        return parse_module(item)

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[object] | None,
        option_string: str | None = None,
    ) -> None:
        flag = option_string or self.option_strings[0]
        options = vars(namespace)
        collected = dict(options[self.dest] or {})
        for item in values or ():
            try:
                name, given = self.parse(str(item))
            except ValueError as error:
                parser.error(f"{flag}: {error}")
            if name in collected:
                parser.error(f"{flag}: {self.noun} {shown(name)} is given twice")
            collected[name] = given
        options[self.dest] = collected


class InlineVectorsAction(SteeringModulesAction):
    """Collects `SITE=COUNT`."""

    noun = "site"

    def parse(self, item: str) -> tuple[str, object]:
        site, _, count = item.partition("=")
        if not site or not (count.isascii() and count.isdigit()):
            raise ValueError(
                f"found {shown(item)}, expected SITE=COUNT, such as post_block.20=4"
            )
        return site, int(count)


def parse_module(item: str) -> tuple[str, str | Json]:
    """`NAME=PATH`, or a JSON object, as name and form for `additional_config`.

    Raises:
        ValueError: it is neither.
    """
    if item.lstrip().startswith("{"):
        try:
            given = json.loads(item)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"found {shown(item)}, expected JSON: {error}") from None
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
                "in additional_config, expected only one of them"
            )
    steering[section] = {**given, **modules}
    return {**additional, "steering": steering}


def fold_options(additional_config: Json | None, options: Json) -> Json | None:
    """`additional_config` with all that the options say; the input is not changed.

    Args:
        additional_config: as given.
        options: what was parsed. A program with a parser of its own may lack ours.

    Raises:
        SteeringConfigError: a name is given in both places.
    """
    for flag, section in SECTIONS.items():
        given = options.get(flag.removeprefix("--").replace("-", "_"))
        if given:
            additional_config = fold_modules(additional_config, given, section, flag)
    if decoder_layer := options.get("steering_decoder_layer"):
        additional = dict(additional_config or {})
        steering = {
            **(additional.get("steering") or {}),
            "decoder_layer": decoder_layer,
        }
        additional_config = {**additional, "steering": steering}
    return additional_config


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    group = parser.add_argument_group(
        title="SteeringConfig",
        description="Steering with SAEs and vectors. additional_config.steering has "
        "more options.",
    )
    group.add_argument(
        FLAG,
        nargs="+",
        action=SteeringModulesAction,
        default=None,
        metavar="NAME=PATH",
        help="Steering modules to load at start-up, each as NAME=PATH or as a "
        'JSON object {"name": ..., "path": ..., "feature_units": ..., '
        '"skip_token_ids": ..., "norm_guard": ..., "reference_norm": ..., '
        '"sites": ..., "sharding": ..., "screening": ...}. '
        "PATH is a local path, hf:owner/repo[/sub/path][@revision] or "
        "saelens:RELEASE/SAE_ID[@revision].",
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
        help="Sites at which requests may bring steering vectors of their own. "
        "post_block.20=4 allows each request 4 different vectors at the output of "
        "layer 20. Memory for all requests of a batch is reserved at start-up.",
    )
    group.add_argument(
        DECODER_FLAG,
        choices=get_args(DecoderLayers),
        default=None,
        help="Which decoder layers can be steered. known (the default): the classes "
        "that the documentation lists. auto: others too; their points are found by "
        "name, and a forward on artificial values checks them at start-up.",
    )
    group.add_argument(
        KEY_FLAG,
        type=Secret,
        default=None,
        metavar="KEY",
        help="Bearer key of the routes that change modules and presets. The routes "
        "exist if VLLM_PLUGINS names steering. Without a key nothing can be changed. "
        "Other users of a machine can read a command line, so prefer the environment "
        "variable VLLM_STEERING_API_KEY.",
    )
