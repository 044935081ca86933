# SPDX-License-Identifier: Apache-2.0
"""The models of the gallery: `tiny` is in the repository, `smollm2` on PyPI."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm import LLM

EXAMPLES = Path(__file__).parent.parent
MODULE = "demo"


@dataclass(frozen=True)
class Demo:
    """A model, its SAE, a feature with its maximum, and texts with and without it."""

    model: Path
    sae: Path
    feature: int
    maximum: float
    about: tuple[str, ...]
    other: tuple[str, ...]
    prompt: str
    stems: tuple[str, ...]


def tiny() -> Demo:
    """The synthetic language with a feature for the bridge."""
    folder = EXAMPLES / "golden_gate"
    return Demo(
        folder / "model",
        folder / "sae",
        457,
        7.55,
        ("the rusty golden gate", "the famous orange tower sways"),
        ("the chef stirs the tomato soup", "the brown bear sleeps in the den"),
        "the chef stirs the",
        ("bridge", "gate", "golden", "tower", "deck", "bay", "fog", "cable"),
    )


def smollm2() -> Demo:
    """SmolLM2-135M-Instruct with a feature for the sea."""
    folder = EXAMPLES / "smollm2"
    sys.path.insert(0, str(folder))
    import checkpoint

    return Demo(
        checkpoint.prepare(),
        folder / "sae",
        2641,
        51.5,
        ("The ship sailed into the harbour.", "Waves crashed on the beach."),
        ("Boil the pasta with garlic.", "The judge sent him to prison."),
        "My favourite thing about today is",
        ("sea", "ship", "sail", "boat", "ocean", "port", "captain", "island", "wave"),
    )


def demo_of_command_line(description: str | None) -> Demo:
    """`--model tiny` (the default) or `--model smollm2`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", choices=("tiny", "smollm2"), default="tiny")
    return {"tiny": tiny, "smollm2": smollm2}[parser.parse_args().model]()


def start(demo: Demo) -> LLM:
    """An engine in this process, with the SAE as module `demo`."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    return LLM(
        str(demo.model),
        max_model_len=256,
        kv_cache_memory_bytes=1 << 28,
        enforce_eager=True,
        additional_config={"steering": {"modules": {MODULE: str(demo.sae)}}},
    )


def topic_share(text: str, demo: Demo) -> float:
    """Share of the words of `text` that start with one of the demo's stems, 0..1."""
    words = text.lower().split()
    return sum(word.startswith(demo.stems) for word in words) / max(1, len(words))
