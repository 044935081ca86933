# SPDX-License-Identifier: Apache-2.0
"""Make the module that is shipped from what `train.py` wrote.

    python examples/smollm2/ship.py OUT [MODULE]

Writes the native layout, with the norm guard that the model needs (the first token of
every sequence is an attention sink, a hundred times longer than the others), and
`evidence.json`: card, statistics and contexts of each feature.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import checkpoint
import labels
import torch
from data import MIN_P, WIDTH
from sae import JumpReLU
from safetensors.torch import load_file
from train import LAYER, MODEL
from transformers import AutoTokenizer

from vllm.model_executor.model_loader.sae_loader import save_native

HERE = Path(__file__).parent
NORM_GUARD = 10.0
SHOWN_CONTEXTS = 2
BEFORE, AFTER = 8, 4  # tokens around the strongest one


def main() -> None:
    """Write the module."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("out", type=Path, help="folder that train.py wrote")
    parser.add_argument("module", type=Path, nargs="?", default=HERE / "sae")
    parser.add_argument("--checkpoint", type=Path)
    options = parser.parse_args()
    card = json.loads((options.out / "card.json").read_text())
    facts = load_file(options.out / "evidence.safetensors")
    chosen = next(c for c in card["tried"] if c["k"] == card["chosen"])
    write_module(options.out / f"k{card['chosen']}", card, chosen, options.module)
    path = options.checkpoint or checkpoint.prepare()
    tokenizer = AutoTokenizer.from_pretrained(path)
    content = {
        "card": summary(chosen),
        **{key: rounded(facts[key]) for key in ("max", "p99", "p50", "frequency")},
        "contexts": contexts(facts, tokenizer),
    }
    (options.module / "evidence.json").write_text(
        json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n"
    )
    names = labels.make(facts, tokenizer)
    (options.module / "labels.json").write_text(
        json.dumps(names, ensure_ascii=False, indent=0) + "\n"
    )
    card["labels"] = labels.summary(names)
    card["sampling"] = {"temperature": 1.0, "min_p": MIN_P}
    (options.module / "card.json").write_text(json.dumps(card, indent=1) + "\n")


def write_module(
    trained: Path, card: dict[str, Any], chosen: dict[str, Any], out: Path
) -> None:
    """The native layout: the encoder's own bias takes up `b_dec`."""
    sae = JumpReLU.load(trained)
    tensors = {
        "W_enc": sae.W_enc.T.contiguous(),
        "b_enc": sae.b_enc - sae.b_dec @ sae.W_enc.float(),
        "threshold": sae.threshold,
        "W_dec": sae.W_dec,
        "b_dec": sae.b_dec,
    }
    quality = summary(chosen)
    save_native(
        out,
        {
            (LAYER, "post_block"): {
                **tensors,
                "fvu": quality["fvu"],
                "l0": quality["l0"],
            }
        },
        reference_norm=round(card["activations"]["mean_norm"], 2),
        norm_guard=NORM_GUARD,
        model=MODEL,
    )


def summary(chosen: dict[str, Any]) -> dict[str, float]:
    """The figures on held-out text, both sources alike."""
    texts = list(chosen["held_out"].values())
    keys = ("fvu", "l0", "ce_plain", "ce_reconstructed", "ce_mean_ablated")
    found = {key: round(sum(t[key] for t in texts) / len(texts), 4) for key in keys}
    lost = found["ce_mean_ablated"] - found["ce_reconstructed"]
    possible = found["ce_mean_ablated"] - found["ce_plain"]
    return {**found, "ce_recovered": round(lost / possible, 4)}


def rounded(values: torch.Tensor) -> list[float]:
    """Four significant digits."""
    return [float(f"{v:.4g}") for v in values.tolist()]


def contexts(
    facts: dict[str, torch.Tensor], tokenizer: Any
) -> dict[str, list[tuple[str, str, str]]]:
    """By feature: text before, token, text after, where it is strongest."""
    found = {}
    values, places = facts["context_values"], facts["context_places"]
    for feature in range(len(values)):
        rows = []
        for value, place in zip(values[feature], places[feature], strict=True):
            if value > 0 and len(rows) < SHOWN_CONTEXTS:
                rows.append(_context(facts, int(place), tokenizer))
        if rows:
            found[str(feature)] = rows
    return found


def _context(
    facts: dict[str, torch.Tensor], place: int, tokenizer: Any
) -> tuple[str, str, str]:
    row, at = divmod(place, WIDTH)
    tokens, counts = facts["tokens"][row], facts["counts"][row]
    around = range(max(0, at - BEFORE), min(WIDTH, at + AFTER + 1))
    kept = [i for i in around if counts[i] or i == at]

    def text(places: list[int]) -> str:
        return tokenizer.decode(tokens[places])

    before = text([i for i in kept if i < at])
    return before, text([at]), text([i for i in kept if i > at])


if __name__ == "__main__":
    main()
