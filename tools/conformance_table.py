# SPDX-License-Identifier: Apache-2.0
"""Prints the table of model families and points, or writes it into the docs.

The cells come from the conformance cases that the tests run against Hugging Face
(tests/steering_testing/cases.py). `--write` puts the table into
docs/features/models.md; a test compares the two.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "features" / "models.md"
BEGIN, END = "<!-- conformance: begin -->", "<!-- conformance: end -->"


def table() -> str:
    """The table as Markdown."""
    sys.path.insert(0, str(ROOT / "tests"))
    from steering_testing.backend_cases import BACKEND_CASES
    from steering_testing.cases import (
        AUTO_CASES,
        CASES,
        GPU_CASES,
        MULTIMODAL_BACKEND_CASES,
        MULTIMODAL_CASES,
        RESIDUAL,
        SUBLAYER,
        TRANSFORMERS_CASES,
    )

    hooks = (*RESIDUAL, *SUBLAYER, "transcoder")
    lines = [
        "| models | decoder layer | "
        + " | ".join(f"`{hook}`" for hook in hooks)
        + " |",
        "|---|---|" + "---|" * len(hooks),
    ]
    groups = {
        "": {
            **CASES,
            **MULTIMODAL_CASES,
            **TRANSFORMERS_CASES,
            **BACKEND_CASES,
            **MULTIMODAL_BACKEND_CASES,
        },
        ", `--steering-decoder-layer auto`": AUTO_CASES,
    }
    rows = [(case, how) for how, group in groups.items() for case in group.values()]
    for case, how in rows:
        lacks = set(case.lacks) | ({"transcoder"} if "mlp_out" in case.lacks else set())
        tick = "≈" if case.rounds else "✓"
        cells = ["–" if hook in lacks else tick for hook in hooks]
        name = case.layer_class.rsplit(".", 1)[1]
        lines.append(f"| {case.title}{how} | `{name}` | " + " | ".join(cells) + " |")
    also = ", ".join(sorted({case.title for case in GPU_CASES.values()}))
    lines += [
        "",
        f"`tests/gpu/test_families_gpu.py` has cases for a GPU, in bfloat16: {also}",
    ]
    lines += ["(DeepSeek with latent attention, Qwen with linear attention in Triton)."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"update {PAGE}")
    text = table()
    if not parser.parse_args().write:
        print(text)
        return
    page = PAGE.read_text()
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


if __name__ == "__main__":
    main()
