# SPDX-License-Identifier: Apache-2.0
"""Draws time against tokens, floor and baselines, from a benchmark's result file.

    python benchmarks/plot_kernels.py benchmarks/results/NVIDIA_H200.json

Writes docs/kernels_<gpu>.png.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

LINES = {
    "jumprelu": ("JumpReLU, L0 = 100", "C0", "o-"),
    "topk": ("TopK, k = 64", "C1", "s-"),
    "cublas_pair": ("dense cuBLAS pair, bf16, graphed", "C2", "^--"),
    "torch_port": ("plain torch port", "C3", "v--"),
}


def series(rows: list[dict[str, Any]], shape: str, case: str, key: str) -> Any:
    """(tokens, values) of one case at one shape, by tokens."""
    found = [r for r in rows if r["shape"] == shape and r["case"] == case]
    found.sort(key=lambda row: row["tokens"])
    return [r["tokens"] for r in found], [r[key] for r in found]


def main() -> None:
    """Reads the result file and writes one panel per shape."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    data = json.loads(args.results.read_text())
    rows = data["kernel"]
    shapes = list(dict.fromkeys(r["shape"] for r in rows if r["case"] == "jumprelu"))
    figure, panels = plt.subplots(
        1, len(shapes), figsize=(5 * len(shapes), 4.2), squeeze=False
    )
    for panel, shape in zip(panels[0], shapes, strict=True):
        tokens, floor = series(rows, shape, "jumprelu", "floor_us")
        panel.plot(tokens, floor, "k:", label="floor: bytes or flops")
        for case, (label, colour, style) in LINES.items():
            at, us = series(rows, shape, case, "us")
            if at:
                panel.plot(at, us, style, color=colour, label=label)
        panel.set(xscale="log", yscale="log", xlabel="tokens", ylabel="microseconds")
        panel.set_title(f"F x D = {shape.replace('x', ' x ')}")
        panel.grid(True, which="both", alpha=0.2)
    panels[0][0].legend(fontsize=8)
    figure.suptitle(f"Full reconstruction of every token, {data['gpu']}, cold L2")
    figure.tight_layout()
    docs = Path(__file__).resolve().parent.parent / "docs"
    out = args.out or docs / f"kernels_{args.results.stem}.png"
    figure.savefig(out, dpi=130)
    print(out)


if __name__ == "__main__":
    main()
