# SPDX-License-Identifier: Apache-2.0
"""Run a notebook's cells in one process, without Jupyter, and keep what they show.

    python tools/run_notebook.py NOTEBOOK [--write]

The cells run one after the other in the repository's root, as Jupyter would run them
there. Each shows what it prints, and the value of its last expression: as text, and as
HTML where it has a `_repr_html_`. `--write` stores this in the notebook.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import json
import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ADDRESS = re.compile(r" at 0x[0-9a-f]+")

Cell = dict[str, Any]


def source_of(cell: Cell) -> str:
    """The text of a cell, which a notebook stores as lines."""
    return "".join(cell["source"])


def run_cell(source: str, names: dict[str, Any], where: str) -> list[Cell]:
    """Run one cell; its outputs in the form that a notebook stores."""
    tree = ast.parse(source)
    last = (
        tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    )
    value = None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, where, "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), where, "eval"), names)
    outputs: list[Cell] = []
    if printed.getvalue():
        lines = printed.getvalue().splitlines(keepends=True)
        outputs.append({"name": "stdout", "output_type": "stream", "text": lines})
    if value is not None:
        outputs.append(shown(value))
    return outputs


def shown(value: Any) -> Cell:
    """The output of a cell whose last expression has this value."""
    plain = ADDRESS.sub("", repr(value))
    data = {"text/plain": plain[:400].splitlines(keepends=True)}
    if hasattr(type(value), "_repr_html_"):
        data["text/html"] = value._repr_html_().splitlines(keepends=True)
    return {
        "data": data,
        "execution_count": None,
        "metadata": {},
        "output_type": "execute_result",
    }


def run(notebook: dict[str, Any], name: str) -> dict[str, Any]:
    """Run every code cell and store its outputs; the names that the cells define.

    Raises:
        whatever a cell raises.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    count = 0
    for at, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] != "code":
            continue
        count += 1
        outputs = run_cell(source_of(cell), names, f"{name}, cell {at}")
        for output in outputs:
            if "execution_count" in output:
                output["execution_count"] = count
        cell["execution_count"], cell["outputs"] = count, outputs
    return names


def main() -> None:
    """Run the notebook of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--write", action="store_true", help="store the outputs")
    args = parser.parse_args()
    path = args.notebook.resolve()
    notebook = json.loads(path.read_text())
    os.chdir(ROOT)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # vLLM logs to stdout
    run(notebook, path.name)
    if args.write:
        text = json.dumps(notebook, indent=1, ensure_ascii=False)
        path.write_text(text + "\n")


if __name__ == "__main__":
    main()
