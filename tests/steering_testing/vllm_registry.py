# SPDX-License-Identifier: Apache-2.0
"""The decoder-layer classes of vLLM's text-generation models, read from its source.

To import every model takes minutes, and some import on a GPU alone. So the source is
parsed: from the model's class, names are followed through functions, classes and
imports of other models.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from torch import nn

import vllm
from vllm.model_executor.models.registry import _TEXT_GENERATION_MODELS

ARCHITECTURES = _TEXT_GENERATION_MODELS
ROOT = Path(vllm.__file__).parent
MODELS = "vllm.model_executor.models"
LAYER = re.compile(r"(DecoderLayer|HybridLayer|ParallelHybrid|Block)$")
# Blocks that are the MLP of a layer, branches of one, and layers of towers.
INNER = re.compile(
    r"(MLP|SparseMoe|FusedMoE|MoEMoE|Laurel|Vision)\w*Block$"
    r"|^FalconH1(SSM|Attention)DecoderLayer$"
)


@dataclass
class Module:
    """One source file: what it defines and what it imports from other models."""

    name: str
    defined: dict[str, ast.AST] = field(default_factory=dict)
    imported: dict[str, tuple[str, str]] = field(default_factory=dict)


def _absolute(node: ast.ImportFrom, name: str, is_package: bool) -> str:
    """The module that an import statement of module `name` reads."""
    if node.level == 0:
        return node.module or ""
    package = name.split(".")
    package = package[: len(package) - node.level + is_package]
    return ".".join([*package, *([node.module] if node.module else [])])


@cache
def parse(name: str) -> Module | None:
    """A module of vLLM's models; None for any other."""
    if not name.startswith((MODELS, "vllm.models")):
        return None
    path = ROOT.joinpath(*name.split(".")[1:])
    is_package = path.is_dir()
    path = path / "__init__.py" if is_package else path.with_suffix(".py")
    if not path.exists():
        return None
    module = Module(name)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            source = _absolute(node, name, is_package)
            for alias in node.names:
                # A package chooses between platforms; each is one of several targets.
                key = alias.asname or alias.name
                while key in module.imported:
                    key += "'"
                module.imported[key] = (source, alias.name)
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            module.defined[node.name] = node
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    module.defined[target.id] = node
    return module


def _used(node: ast.AST) -> set[str]:
    return {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}


def reachable(module: str, name: str) -> dict[tuple[str, str], ast.ClassDef]:
    """The classes that a name uses, by module and name, itself included."""
    found: dict[tuple[str, str], ast.ClassDef] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [(module, name)]
    while waiting:
        at = waiting.pop()
        parsed = parse(at[0])
        if at in seen or parsed is None:
            continue
        seen.add(at)
        aliases = [key for key in parsed.imported if key.rstrip("'") == at[1]]
        waiting += [parsed.imported[key] for key in aliases]
        node = parsed.defined.get(at[1])
        if node is None:
            continue
        if isinstance(node, ast.ClassDef):
            found[at] = node
        waiting += [(at[0], used) for used in _used(node)]
    return found


@cache
def decoder_layers(architecture: str) -> dict[str, ast.ClassDef]:
    """The decoder-layer classes of an architecture, by `package.module.Class`."""
    where, name = ARCHITECTURES[architecture]
    module = where if where.startswith("vllm.") else f"{MODELS}.{where}"
    return {
        ".".join(at): node
        for at, node in reachable(module, name).items()
        if LAYER.search(at[1]) and not INNER.search(at[1])
    }


def _with_bases(full_name: str) -> Iterator[ast.ClassDef]:
    """A class and those of its bases that vLLM's models define."""
    module, name = full_name.rsplit(".", 1)
    classes = reachable(module, name)
    node = classes[module, name]
    yield node
    for base in node.bases:
        for (where, found), _ in classes.items():
            if isinstance(base, ast.Name) and found == base.id:
                yield from _with_bases(f"{where}.{found}")


def stand_in(full_name: str) -> nn.Module:
    """A module with the class's name, forward's parameters and children's names."""
    children, forward = set(), None
    for node in _with_bases(full_name):
        for each in ast.walk(node):
            if isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Store):
                children.add(each.attr)
        methods = [m for m in node.body if isinstance(m, ast.FunctionDef)]
        own = next((m for m in methods if m.name == "forward"), None)
        forward = forward or own
    assert forward is not None, full_name
    names = [argument.arg for argument in forward.args.args]
    scope: dict[str, object] = {}
    exec(f"def forward({', '.join(names)}): ...", scope)
    cls = type(full_name.rsplit(".", 1)[1], (nn.Module,), {"forward": scope["forward"]})
    made = cls()
    for child in children:
        made.add_module(child, nn.Identity())
    return made
