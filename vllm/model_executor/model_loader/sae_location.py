# SPDX-License-Identifier: Apache-2.0
"""Find a module's files: local, on the Hugging Face Hub, or in SAELens's list."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from vllm.config.steering_checks import one_line
from vllm.model_executor.model_loader.sae_formats import saelens_list
from vllm.model_executor.model_loader.sae_formats.layout import LayoutError, Location

_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_HF_PATH = re.compile(
    rf"hf:({_REPOSITORY.pattern})(?:/([^@]*?))?/?(?:@([\w-][\w./-]*))?"
)
# One part of a path or revision: no `..`, no pattern and no absolute path.
_STEP = re.compile(r"(?!\.{1,2}$)[\w.:+=, -]+")


@contextmanager
def naming_module(name: str, path: str) -> Iterator[None]:
    """Turn file errors into one line that names the module."""
    try:
        yield
    except (LayoutError, OSError) as error:
        text = f"steering module {name!r} ({path}): {one_line(error)}"
        raise ValueError(text) from error


def resolve_path(path: str) -> tuple[Location, str]:
    """The local files of a path, and the path with its revision pinned.

    Raises:
        LayoutError: nothing there, or the Hugging Face Hub cannot give it.
    """
    if path.startswith(saelens_list.PREFIX):
        return _resolve_listed(path)
    if path.startswith("hf:"):
        return _resolve_hub(path)
    root = Path(path)
    if not root.exists():
        hint = ""
        if _HF_PATH.fullmatch(f"hf:{path}") and not path.startswith("."):
            hint = f"; a repository of the Hugging Face Hub is written hf:{path}"
        raise LayoutError(f"no such file or directory{hint}")
    origin = str(root.absolute())
    overrides = saelens_list.overrides_of(origin)
    return Location(root, origin, overrides=overrides), path


def _resolve_listed(path: str) -> tuple[Location, str]:
    """As `resolve_path`, for `saelens:RELEASE/SAE_ID[@revision]`."""
    name, at, revision = path.removeprefix(saelens_list.PREFIX).partition("@")
    release, _, sae_id = name.partition("/")
    listed = saelens_list.find(release, sae_id)
    location, pinned = _resolve_hub(f"hf:{listed.repo}/{listed.path}{at}{revision}")
    commit = pinned.rpartition("@")[2]
    location = replace(location, overrides=listed.overrides)
    return location, f"{saelens_list.PREFIX}{name}@{commit}"


def _resolve_hub(path: str) -> tuple[Location, str]:
    """As `resolve_path`, for `hf:owner/repo[/sub/path][@revision]`."""
    match = _HF_PATH.fullmatch(path)
    repo, sub, revision = match.groups() if match else ("", "", "")
    steps = _parts(sub) + _parts(revision)
    if match is None or not all(_STEP.fullmatch(step) for step in steps):
        raise LayoutError(
            "expected hf:owner/repo[/sub/path][@revision] with a relative sub-path"
        )
    # Deferred: local modules need no Hub client.
    from huggingface_hub import snapshot_download

    try:
        snapshot = Path(
            snapshot_download(
                repo, revision=revision, allow_patterns=_patterns(sub) if sub else None
            )
        )
    except Exception as error:
        detail = (str(error).splitlines() or [type(error).__name__])[0]
        raise LayoutError(f"cannot be fetched from the Hub: {detail}") from error
    root = snapshot.joinpath(*_parts(sub))
    # A snapshot's files are links into the repository's cache, two levels up.
    cache = snapshot.parent.parent.resolve()
    if not root.exists() or not root.resolve().is_relative_to(cache):
        raise LayoutError(f"the repository has no {sub}")
    origin = f"hf:{repo}/{sub}" if sub else f"hf:{repo}"
    overrides = saelens_list.overrides_of(origin)
    return Location(root, origin, overrides=overrides), f"{origin}@{snapshot.name}"


def _patterns(sub: str) -> list[str]:
    """What to fetch for a sub-path: itself, its contents, and the files beside it."""
    folder, _, name = sub.rpartition("/")
    beside = [f"{name.removesuffix('.pt')}_cfg.json", "config.yaml"]
    return [sub, f"{sub}/*", *(f"{folder}/{n}".lstrip("/") for n in beside)]


def _parts(sub: str | None) -> list[str]:
    return sub.split("/") if sub else []


@dataclass(frozen=True)
class LocatedModule:
    """A module's files. `path` is as given; `pinned` has the Hub revision."""

    path: str
    pinned: str
    location: Location


def locate(name: str, path: str) -> LocatedModule:
    """Find a module's files, fetching them from the Hub if the path says so.

    Raises:
        ValueError: as `inspect_module`.
    """
    with naming_module(name, path):
        location, pinned = resolve_path(path)
        return LocatedModule(path, pinned, location)
