# SPDX-License-Identifier: Apache-2.0
"""docs/features/cli.md says what `--help` says, and its examples run as written."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_steering_cli.main import make_parser

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "features" / "cli.md").read_text()
NUMBER = re.compile(r"-?\d+\.\d+")


def subcommands() -> dict[str, argparse.ArgumentParser]:
    for action in make_parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            return action.choices
    raise AssertionError("the parser has no subcommands")


COMMANDS = subcommands()


def section(command: str) -> str:
    return PAGE.split(f"\n## {command}\n", 1)[1].split("\n## ", 1)[0]


def row(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """What `--help` says of one argument, as a row of the page's table."""
    names = ", ".join(action.option_strings)
    if action.choices:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    else:
        value = "" if action.nargs == 0 else str(action.metavar)
    fields = {**vars(action), "prog": parser.prog}
    needed = "Required. " if names and action.required else ""
    return f"| `{f'{names} {value}'.strip()}` | {needed}{str(action.help) % fields} |"


def examples() -> list[tuple[str, str]]:
    """The commands of the page that begin with `$`, each with what is shown below."""
    found = []
    for block in re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, shown = part.replace("\\\n", "").partition("\n")
            found.append((command, shown))
    return found


MODEL_COMMANDS = ("probe", "features", "survey")
QUICK = [one for one in examples() if shlex.split(one[0])[1] in ("inspect", "convert")]
LONG = [one for one in examples() if shlex.split(one[0])[1] in MODEL_COMMANDS]


def run(command: str, folder: Path) -> tuple[str, str]:
    """Standard output and error of a command; `/tmp` is a folder of the test."""
    words = [word.replace("/tmp", str(folder)) for word in shlex.split(command)]
    assert words[0] == "vllm-steering"
    done = subprocess.run(
        [sys.executable, "-m", "vllm_steering_cli", *words[1:]],
        cwd=ROOT,
        env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    out = done.stdout.replace(str(folder), "/tmp")
    return out, done.stderr.replace(str(folder), "/tmp")


def test_every_command_has_a_section_and_a_row_with_its_help() -> None:
    assert re.findall(r"^## (\w+)$", PAGE, re.MULTILINE) == list(COMMANDS)
    for action in make_parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            for choice in action._choices_actions:
                name = choice.dest
                assert f"| [`{name}`](#{name}) | {choice.help} |" in PAGE


@pytest.mark.parametrize("command", COMMANDS)
def test_every_argument_has_the_row_that_help_says(command: str) -> None:
    parser = COMMANDS[command]
    actions = [one for one in parser._actions if "--help" not in one.option_strings]
    expected = [row(parser, action) for action in actions]
    rows = re.findall(r"^\| `.*$", section(command), re.MULTILINE)
    assert sorted(rows) == sorted(expected)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_an_example_with_its_output(command: str) -> None:
    shown = [text for line, text in examples() if shlex.split(line)[1] == command]
    assert any(text.strip() for text in shown)


def test_the_quick_examples_print_what_the_page_shows(tmp_path: Path) -> None:
    assert len(QUICK) >= 3
    for command, shown in QUICK:
        assert "".join(run(command, tmp_path)) == shown, command


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.parametrize(("command", "shown"), LONG, ids=[one[0][:24] for one in LONG])
def test_the_examples_with_a_model_print_what_the_page_shows(
    command: str, shown: str, tmp_path: Path
) -> None:
    for name, text in re.findall(
        r"cat > /tmp/(\w+\.txt) <<'END'\n(.*?)END\n", PAGE, re.DOTALL
    ):
        (tmp_path / name).write_text(text)
    said, errors = run(command, tmp_path)
    assert said, errors[-2000:]
    assert NUMBER.sub("0", said).split() == NUMBER.sub("0", shown).split()
    for own, page in zip(NUMBER.findall(said), NUMBER.findall(shown), strict=True):
        assert float(own) == pytest.approx(float(page), rel=0.02, abs=0.02)
