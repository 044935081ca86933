# SPDX-License-Identifier: Apache-2.0
"""A small real model talks only about the sea, only in French, or only in verse.

    python examples/smollm2/demo.py [--png FILE] [--compile]

SmolLM2-135M-Instruct answers the same prompts plain, purely reconstructed by its SAE,
and with one feature clamped, in one batch of one engine. If the model cannot be
fetched, the tiny demo runs instead. Exits with 1 if a check fails.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import checkpoint
from topics import TOPICS, Topic

if TYPE_CHECKING:
    from vllm import LLM

HERE = Path(__file__).parent
SAE = HERE / "sae"
TINY = HERE.parent / "golden_gate" / "demo.py"
MODULE = "smollm2"
PROMPTS = (
    "Tell me about your day.",
    "What should I do this weekend?",
    "Who are you?",
)
STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.25)
SHOWN = 1.0
TOKENS = 40
SEED = 1
WIDTH = 92


@dataclass(frozen=True)
class Mode:
    """One way of running every prompt: plain, reconstructed, or with a clamp."""

    name: str
    field: str | None = None
    feature: int | None = None
    value: float = 0.0

    def extra_args(self) -> dict[str, Any]:
        """What goes into `SamplingParams.extra_args`."""
        if self.field is None:
            return {}
        clamp = {
            "feature_idx": self.feature,
            "kind": "absolute",
            "value": self.value,
        }
        clamps = {} if self.feature is None else [clamp]
        return {self.field: [{"module_name": MODULE, "clamps": clamps}]}


FULL, DELTA = "sae_full_reconstruction_specs", "sae_clamp_specs"
PLAIN, RECONSTRUCTION = Mode("plain"), Mode("pure reconstruction", FULL)


def clamped(topic: Topic, field: str, strength: float, top: float) -> Mode:
    """The topic's feature held at `strength` times its maximum."""
    tier = "full" if field == FULL else "delta"
    name = f"{tier}, {topic.name} at {strength:g} × max"
    return Mode(name, field, topic.feature, strength * top)


def start_engine(path: Path, compiled: bool) -> LLM:
    """An in-process engine on the model, with the SAE."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    return LLM(
        str(path),
        max_model_len=256,
        max_num_seqs=128,
        kv_cache_memory_bytes=1 << 28,
        enforce_eager=not compiled,
        additional_config={"steering": {"modules": {MODULE: str(SAE)}}},
    )


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """Hold back what libraries print to stderr; show it if the body fails."""
    kept = os.dup(2)
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 2)
        try:
            yield
        except BaseException:
            log.seek(0)
            os.write(kept, log.read())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def answer(llm: LLM, modes: list[Mode]) -> dict[Mode, list[str]]:
    """Every mode's answers to `PROMPTS`, all in one batch."""
    from vllm import SamplingParams

    tokenizer = llm.get_tokenizer()
    chats = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            tokenize=False,
            add_generation_prompt=True,
        )
        for prompt in PROMPTS
    ]
    params = [
        SamplingParams(
            max_tokens=TOKENS,
            temperature=0.7,
            seed=SEED,
            extra_args=mode.extra_args(),
        )
        for mode in modes
        for _ in PROMPTS
    ]
    outputs = llm.generate(chats * len(modes), params, use_tqdm=False)
    texts = [output.outputs[0].text for output in outputs]
    n = len(PROMPTS)
    return {mode: texts[i * n : (i + 1) * n] for i, mode in enumerate(modes)}


# --- Printing -----------------------------------------------------------------


def color(text: str, code: str) -> str:
    """`text` in an ANSI style where the output is a terminal."""
    return f"\033[{code}m{text}\033[0m" if sys.stdout.isatty() else text


def print_answer(label: str, text: str, topic: Topic | None) -> None:
    """A labelled, wrapped answer with the topic's words marked."""
    body = textwrap.fill(" ".join(text.split()), WIDTH - 23)
    if topic:
        body = topic.pattern().sub(lambda m: color(m[0], "1;33"), body)
    print(f"  {label:<20} " + body.replace("\n", "\n" + " " * 23))


def print_sae(evidence: dict[str, Any], labels: dict[str, str]) -> None:
    """What the SAE is and what the demo's features answer to."""
    card = evidence["card"]
    print(
        f"  resid_post of layer 15, {len(evidence['max'])} features; on held-out text "
        f"FVU {card['fvu']:.3f}, L0 {card['l0']:.0f},\n"
        f"  cross-entropy {card['ce_plain']:.3f} plain, "
        f"{card['ce_reconstructed']:.3f} reconstructed "
        f"({card['ce_recovered']:.1%} recovered)"
    )
    for topic in TOPICS:
        key = str(topic.feature)
        label = (
            f"{topic.feature} {labels[key]}, max {evidence['max'][topic.feature]:.0f}"
        )
        print(f"  {color(label, '1')}")
        for before, token, after in evidence["contexts"][key]:
            text = f"{before[-40:]}[{token}]{after[:16]}"
            print("      … " + " ".join(text.split()))


def print_answers(answers: dict[Mode, list[str]], tops: dict[Topic, float]) -> None:
    """The first prompt's answers, side by side."""
    print(color(f"\n  > {PROMPTS[0]}", "1"))
    print_answer("plain", answers[PLAIN][0], None)
    print_answer("pure reconstruction", answers[RECONSTRUCTION][0], None)
    for topic in TOPICS:
        top = tops[topic]
        for field, tier in ((DELTA, "delta"), (FULL, "full")):
            text = answers[clamped(topic, field, SHOWN, top)][0]
            print_answer(f"{topic.name}: {tier}", text, topic)


def print_sweep(shares: dict[Topic, list[float]]) -> None:
    """Share of on-topic words by strength, as bars."""
    print("\n  share of the topic's words, full reconstruction, by strength (× max)")
    print("  " + " " * 10 + "".join(f"{s:>12g}" for s in STRENGTHS))
    for topic, values in shares.items():
        cells = "".join(f"{_bar(v):>7}{v:>5.0%}" for v in values)
        print(f"  {topic.name:<10}{cells}")


def _bar(share: float) -> str:
    """Up to six eighth-blocks; a share of a half fills it."""
    eighths = round(min(1.0, 2 * share) * 6 * 8)
    full, rest = divmod(eighths, 8)
    return "█" * full + (" ▏▎▍▌▋▊▉"[rest] if rest else "")


def save_png(shares: dict[Topic, list[float]], path: Path) -> bool:
    """The same as a picture; False where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.4))
    for topic, values in shares.items():
        axes.plot(STRENGTHS, [100 * v for v in values], marker="o", label=topic.name)
    axes.set_xlabel("feature held at (× its maximum)")
    axes.set_ylabel("on-topic words (%)")
    axes.set_title("SmolLM2-135M-Instruct, full reconstruction")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    return True


def check(shares: dict[Topic, list[float]], answers: dict[Mode, list[str]]) -> int:
    """Print a line for each claim; the number of those that fail."""
    failed = 0
    for topic, values in shares.items():
        plain = topic.share(answers[PLAIN])
        recon = topic.share(answers[RECONSTRUCTION])
        at = values[STRENGTHS.index(SHOWN)]
        holds = at > plain + 0.05 and at > 2 * plain and recon < plain + 0.05
        failed += not holds
        verdict = color("PASS", "32") if holds else color("FAIL", "31")
        print(
            f"  {verdict}  {topic.name} words: {plain:.0%} plain, {recon:.0%} purely "
            f"reconstructed, {at:.0%} at {SHOWN:g} × max"
        )
    return failed


def run(path: Path, options: argparse.Namespace) -> int:
    """The demo on the checkpoint at `path`; the number of failed checks."""
    start = time.perf_counter()
    evidence = json.loads((SAE / "evidence.json").read_text())
    labels = json.loads((SAE / "labels.json").read_text())
    tops = {topic: evidence["max"][topic.feature] for topic in TOPICS}
    with quiet_stderr():
        llm = start_engine(path, options.compile)
    print(color(f"== SmolLM2-135M-Instruct and its SAE {'=' * 40}", "1"))
    print_sae(evidence, labels)
    sweep = {
        topic: [clamped(topic, FULL, s, tops[topic]) for s in STRENGTHS]
        for topic in TOPICS
    }
    deltas = [clamped(topic, DELTA, SHOWN, tops[topic]) for topic in TOPICS]
    modes = [PLAIN, RECONSTRUCTION, *deltas, *(m for ms in sweep.values() for m in ms)]
    answers = answer(llm, modes)
    print_answers(answers, tops)
    shares = {
        topic: [topic.share(answers[mode]) for mode in ms]
        for topic, ms in sweep.items()
    }
    print_sweep(shares)
    saved = save_png(shares, options.png)
    print(f"  plot: {options.png}" if saved else "  no plot: matplotlib is missing")
    print()
    failed = check(shares, answers)
    print(f"  {len(modes) * len(PROMPTS)} answers, {time.perf_counter() - start:.0f} s")
    return failed


def main() -> int:
    """Run the demo; 1 when a check failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--png", type=Path, default=Path("demo.png"))
    parser.add_argument("--compile", action="store_true", help="a slower start")
    options = parser.parse_args()
    try:
        path = checkpoint.prepare()
    except checkpoint.Unavailable as error:
        print(f"{error}\nThe tiny demo runs in its place.", flush=True)
        return subprocess.call([sys.executable, str(TINY), "--no-server"])
    return int(run(path, options) > 0)


if __name__ == "__main__":
    sys.exit(main())
