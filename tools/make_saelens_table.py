# SPDX-License-Identifier: Apache-2.0
"""Write the table behind `saelens:RELEASE/SAE_ID` from the installed sae-lens package.

Run with a Python that has sae-lens:

    python tools/make_saelens_table.py

It keeps only facts: each release's repository, model and loader, how an id becomes a
path, and what the list says and the files of the SAEs do not: normalisation, its
factor, and whether the model's residual stream was centred.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

OUT = Path("vllm/model_executor/model_loader/sae_formats/saelens_releases.json")
# Loaders whose files lack the factor of the normalisation.
SCALED_LOADERS = ("sae_lens", "llama_scope_r1_distill")
_NUMBER = re.compile(r"[0-9]+")


def read_list() -> dict[str, Any]:
    """The list of releases of the installed sae-lens, without importing it."""
    spec = importlib.util.find_spec("sae_lens")
    if spec is None or spec.origin is None:
        raise SystemExit("sae-lens is not installed here: pip install sae-lens")
    path = Path(spec.origin).parent / "pretrained_saes.yaml"
    return yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.Loader))


def rules_of(pairs: Iterable[tuple[str, str]]) -> tuple[list[list[str]], dict]:
    """Rules `[id pattern, path template]` that explain the pairs, and the others.

    A pattern is the id with `{}` for each number that differs between ids; a template
    refers to those by their position, as in `["l{}r_8x", "L{0}R-8x"]`.
    """
    groups: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for name, path in pairs:
        groups[_NUMBER.sub("{}", name), _NUMBER.sub("{}", path)].append((name, path))
    rules: dict[str, str] = {}
    listed: dict[str, str] = {}
    for members in groups.values():
        rule = rule_of(members)
        if rule is None or rule[0] in rules:
            listed.update(members)
        else:
            rules[rule[0]] = rule[1]
    return [list(rule) for rule in rules.items()], listed


def rule_of(members: list[tuple[str, str]]) -> tuple[str, str] | None:
    """The rule that turns every id of these into its path; None: there is none."""
    if len(members) == 1:
        return None
    ids = columns([name for name, _ in members])
    varying = [column for column in ids if len(set(column)) > 1]
    pattern = fill(members[0][0], ["{}" if c in varying else c[0] for c in ids])
    numbers = []
    for column in columns([path for _, path in members]):
        if column in varying:
            numbers.append(f"{{{varying.index(column)}}}")
        elif len(set(column)) == 1:
            numbers.append(column[0])
        else:
            return None
    return pattern, fill(members[0][1], numbers)


def columns(texts: list[str]) -> list[tuple[str, ...]]:
    """For each number of the texts, which have equally many, its value in each."""
    return list(zip(*(_NUMBER.findall(text) for text in texts), strict=True))


def fill(text: str, numbers: list[str]) -> str:
    """The text with its numbers replaced."""
    return "".join(
        part + number
        for part, number in zip(_NUMBER.split(text), [*numbers, ""], strict=True)
    )


def entry_of(release: dict[str, Any]) -> dict[str, Any]:
    """One release's row of the table."""
    loader = release["conversion_func"] or "sae_lens"
    saes = release["saes"]
    rules, listed = rules_of((s["id"], str(s["path"])) for s in saes)
    overrides = release.get("config_overrides") or {}
    kwargs = overrides.get("model_from_pretrained_kwargs") or {}
    entry = {
        "repo": release["repo_id"],
        "model": release["model"],
        "loader": loader,
        "rules": rules,
        "listed": listed,
        "normalize": overrides.get("normalize_activations"),
        "centred": bool(kwargs.get("center_writing_weights")),
        "scales": {
            str(s["path"]): s["norm_scaling_factor"]
            for s in saes
            if "norm_scaling_factor" in s and loader in SCALED_LOADERS
        },
    }
    return {key: value for key, value in entry.items() if value}


def main() -> None:
    """Write the table."""
    table = {name: entry_of(release) for name, release in read_list().items()}
    lines = [f"{json.dumps(name)}: {json.dumps(row)}" for name, row in table.items()]
    OUT.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"wrote {len(table)} releases, {OUT.stat().st_size} bytes, to {OUT}")


if __name__ == "__main__":
    main()
