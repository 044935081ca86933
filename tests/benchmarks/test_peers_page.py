# SPDX-License-Identifier: Apache-2.0
"""The figures of docs/peers.md that compare with others are those of the results."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "peers.md").read_text()
RUN = json.loads((ROOT / "benchmarks" / "results" / "NVIDIA_H200.json").read_text())


def times(case: str) -> dict[int, float]:
    """µs by tokens, for the SAE that the page names."""
    rows = [r for r in RUN["kernel"] if (r["case"], r["shape"]) == (case, "16384x2304")]
    return {row["tokens"]: row["us"] for row in rows}


def test_the_op_is_compared_with_the_newest_kernels() -> None:
    own = times("jumprelu")
    assert f"| {min(own.values()):.0f} to {max(own.values()):.0f} µs |" in PAGE
    for case, words in (("cublas_pair", " our time"), ("torch_port", " |")):
        other = times(case)
        assert set(other) == set(own)
        ratios = [other[tokens] / own[tokens] for tokens in own]
        assert f"{min(ratios):.1f} to {max(ratios):.1f} ×{words}" in PAGE, case


def test_the_throughput_is_that_of_the_engines() -> None:
    rows = [
        r for r in RUN["engine"] if (r.get("phase"), r.get("batch")) == ("decode", 64)
    ]
    found = {row["mode"]: row["tokens_per_s"] for row in rows}
    here, there = found["one site"], found["hugging face + hook"]
    assert f"bfloat16: {there:.0f} tokens/s" in PAGE
    assert f"| {here:.0f} tokens/s: {here / there:.1f} × as many |" in PAGE
