# SPDX-License-Identifier: Apache-2.0
"""Entry point of `vllm-steering` and `python -m vllm.entrypoints.steering`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def make_parser() -> argparse.ArgumentParser:
    """The parser; each subcommand is one function of `modules.py`."""
    parser = argparse.ArgumentParser(
        prog="vllm-steering", description="Look at steering modules and convert them."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser(
        "inspect", help="Show sites, folds, memory and digest without loading."
    )
    inspect.add_argument("--json", action="store_true", help="Print JSON.")
    convert = commands.add_parser(
        "convert", help="Fold an SAE and write it as a native directory."
    )
    for command in (inspect, convert):
        command.add_argument(
            "path",
            metavar="PATH",
            help="A local path, or hf:owner/repo[/sub/path][@revision].",
        )
        command.add_argument(
            "--site",
            dest="sites",
            action="append",
            metavar="HOOK.LAYER",
            help="Name the site of a module that does not say its own, or select "
            "one of several; for example post_block.20. May be repeated.",
        )
    convert.add_argument("out", metavar="OUT", help="The directory to write.")
    convert.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="Of the two matrices; everything else stays float32.",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (1 for a module that is refused)."""
    args = make_parser().parse_args(argv)
    # Deferred, so that --help does not import torch.
    from vllm.entrypoints.steering import modules

    try:
        if args.command == "inspect":
            modules.inspect(args.path, args.sites, as_json=args.json)
        else:
            modules.convert(args.path, args.out, args.sites, args.dtype)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
