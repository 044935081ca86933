# SPDX-License-Identifier: Apache-2.0
"""What the demo prints, and the checks that it makes."""

from __future__ import annotations

import re
import sys
import textwrap
from typing import TYPE_CHECKING

import corpus
from demo_engine import PROMPTS, Completion

if TYPE_CHECKING:
    pass


def color(text: str, code: str) -> str:
    """`text` in an ANSI style where the output is a terminal."""
    return f"\033[{code}m{text}\033[0m" if sys.stdout.isatty() else text


def heading(text: str) -> None:
    print("\n" + color(f"== {text} ", "1") + "=" * max(0, 84 - len(text)))


def print_text(label: str, text: str) -> None:
    """A labelled, wrapped text with the bridge words in color."""
    body = textwrap.fill(text.strip(), 62).replace("\n", "\n" + " " * 24)
    pattern = r"\b(" + "|".join(sorted(corpus.BRIDGE_WORDS)) + r")\b"
    body = re.sub(pattern, lambda m: color(m[0], "33"), body)
    print(f"  {label:<20}  {body}")


def print_side_by_side(results: dict[str, list[Completion]]) -> None:
    for i, prompt in enumerate(PROMPTS):
        print("\n" + color(f"  > {prompt}", "1"))
        for name, completions in results.items():
            print_text(name, completions[i].text)


def print_table(
    results: dict[str, list[Completion]], speeds: dict[str, float] | None
) -> None:
    """Per mode: tokens generated, share of bridge words, fluency, tokens/s."""
    print(f"\n  {'mode':<22}{'tokens':>8}{'bridge words':>15}{'fluency':>10}", end="")
    print(f"{'tokens/s':>11}" if speeds else "")
    for name, completions in results.items():
        texts = [c.text for c in completions]
        tokens = sum(len(c.token_ids) for c in completions)
        share, fluent = corpus.bridge_share(texts), corpus.fluency(texts)
        print(f"  {name:<22}{tokens:>8}{share:>15.1%}{fluent:>10.1%}", end="")
        print(f"{speeds[name]:>11.0f}" if speeds else "")


class Verdicts:
    """The demo's checks; prints each as it is made."""

    def __init__(self) -> None:
        self.failed = 0

    def check(self, claim: str, holds: bool) -> None:
        self.failed += not holds
        print(f"  {color('PASS', '32') if holds else color('FAIL', '31')}  {claim}")


def check_results(verdicts: Verdicts, texts: dict[str, list[str]]) -> None:
    """Judge texts per mode: `plain`, `reconstruction`, then the strengths."""
    plain, recon, *clamped = (corpus.bridge_share(t) for t in texts.values())
    fluent = corpus.fluency(texts["reconstruction"])
    print()
    verdicts.check(f"plain text is about other things ({plain:.1%})", plain < 0.15)
    verdicts.check(
        f"pure reconstruction leaves the language intact ({recon:.1%} bridge words, "
        f"{fluent:.1%} fluent)",
        recon < 0.15 and fluent > 0.9,
    )
    shares = ", ".join(f"{share:.1%}" for share in clamped)
    verdicts.check(
        f"the clamp makes most words bridge words ({shares})",
        max(clamped) > 0.5 and min(clamped) > plain + 0.2,
    )
