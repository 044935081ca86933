# SPDX-License-Identifier: Apache-2.0
"""What a trained SAE's activations look like, for benchmarks: how uneven they are.

    python benchmarks/feature_statistics.py MODEL SAE TEXT [--tokens N] [--out FILE]

MODEL is a Hugging Face checkpoint, SAE a native directory with one site of hook
`post_block` and JumpReLU, TEXT a UTF-8 file whose documents are separated by form
feeds. Needs no GPU. Writes

- `frequency`: share of tokens on which each feature is active, sorted, largest first;
- `active_quantiles`: of the number of active features of a token;
- `distinct`: how many features are active somewhere in T consecutive tokens, mean;
- `threshold_over_norm`: quantiles of (threshold - b_enc) / (norm of the encoder row
  x mean norm of the stream), the cosine that makes a feature active;
- `energy_of_dimensions`: the eight dimensions' shares of the stream's squared norm.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

WIDTH = 256
QUANTILES = (0.0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
RUNS = (1, 8, 64, 256)
BATCH = 8


def rows_of(text: str, tokenizer: Any, tokens: int) -> torch.Tensor:
    """`[rows, WIDTH]` token ids; whole rows of documents, first token included."""
    rows = []
    for document in text.split("\f"):
        ids = tokenizer(document)["input_ids"][:WIDTH]
        if len(ids) == WIDTH:
            rows.append(ids)
        if len(rows) * WIDTH >= tokens:
            break
    return torch.tensor(rows)


@torch.no_grad()
def streams(model: Any, layer: int, rows: torch.Tensor) -> Iterator[torch.Tensor]:
    """The stream `[WIDTH - 1, D]` after `layer`, row by row.

    Without the first token, which is an attention sink.
    """
    for batch in rows.split(BATCH):
        hidden = model(batch, output_hidden_states=True).hidden_states[layer + 1]
        yield from hidden[:, 1:].float()


def quantiles(values: torch.Tensor) -> list[float]:
    """At `QUANTILES`, with four digits."""
    found = torch.quantile(values.float(), torch.tensor(QUANTILES))
    return rounded(found)


def rounded(values: torch.Tensor) -> list[float]:
    """Four significant digits."""
    return [float(f"{value:.4g}") for value in values.tolist()]


def statistics(
    weights: dict[str, torch.Tensor], found: Iterator[torch.Tensor]
) -> dict[str, Any]:
    """All that is written, from the streams of some rows."""
    w = {name: tensor.float() for name, tensor in weights.items()}
    number = torch.zeros(len(w["b_enc"]))
    energy = torch.zeros(w["W_enc"].shape[1])
    counts, norms = [], []
    distinct: dict[int, list[int]] = {run: [] for run in RUNS}
    for x in found:
        active = (x @ w["W_enc"].T + w["b_enc"]) > w["threshold"].clamp(min=0)
        number += active.sum(0)
        counts.append(active.sum(1))
        norms.append(x.norm(dim=1))
        energy += x.pow(2).sum(0)
        for run in RUNS:
            for part in active.split(run):
                if len(part) >= min(run, len(x)):
                    distinct[run].append(int(part.any(0).sum()))
    count, norm = torch.cat(counts), torch.cat(norms)
    cosine = (w["threshold"] - w["b_enc"]) / (w["W_enc"].norm(dim=1) * norm.mean())
    frequency = (number / len(count)).sort(descending=True).values
    carried = frequency.cumsum(0) / frequency.sum()
    return {
        "d_sae": len(number),
        "d_model": len(energy),
        "tokens": len(count),
        "l0": round(float(count.float().mean()), 2),
        "share_of_the_64_and_512_most_frequent": rounded(carried[[63, 511]]),
        "active_quantiles": dict(
            zip(map(str, QUANTILES), quantiles(count), strict=True)
        ),
        "distinct": {str(T): round(sum(n) / len(n), 1) for T, n in distinct.items()},
        "threshold_over_norm": dict(
            zip(map(str, QUANTILES), quantiles(cosine), strict=True)
        ),
        "mean_norm": round(float(norm.mean()), 2),
        "energy_of_dimensions": rounded((energy / energy.sum()).topk(8).values),
        "frequency": rounded(frequency),
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("sae", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=40_000)
    parser.add_argument("--source", default="", help="what the text is, for the file")
    parser.add_argument("--out", type=Path, default=Path("feature_statistics.json"))
    options = parser.parse_args()
    (site,) = json.loads((options.sae / "manifest.json").read_text())["sites"]
    if (site["hook"], site["activation"]) != ("post_block", "jumprelu"):
        parser.error(f"{options.sae}: expected a JumpReLU at post_block")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    rows = rows_of(options.text.read_text(), tokenizer, options.tokens)
    measured = statistics(
        load_file(options.sae / site["file"]), streams(model, site["layer"], rows)
    )
    header = {"model": options.model.name, "site": f"post_block.{site['layer']}"}
    content = {**header, "text": options.source, **measured}
    options.out.write_text(json.dumps(content) + "\n")
    print(json.dumps({k: v for k, v in content.items() if k != "frequency"}, indent=1))


if __name__ == "__main__":
    main()
