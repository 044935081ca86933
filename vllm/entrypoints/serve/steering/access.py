# SPDX-License-Identifier: Apache-2.0
"""Who may change modules, and which files they may name."""

from __future__ import annotations

import hmac
import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

from vllm.config.steering_checks import about, listing, shown
from vllm.config.steering_environment import KEY_ENV

# For servers whose own `--api-key` takes the Authorization header.
OWN_HEADER = "x-steering-authorization"
# A module's directory may hold this many entries; each is checked for links.
MAX_ENTRIES = 4096


class RequestRefused(Exception):
    """A request that is refused with `status` (4xx) and the bad field."""

    def __init__(
        self,
        status: int,
        message: str,
        field: str | None = None,
        in_use: int | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.message = about(field, message)
        self.field = field
        self.in_use = in_use


def configured_key(args: Namespace) -> str | None:
    """The key from `--steering-api-key` or the environment, or None."""
    key = vars(args).get("steering_api_key") or os.environ.get(KEY_ENV) or ""
    return key.strip() or None


def holds_key(headers: Mapping[str, str], key: str | None) -> bool:
    """Whether the caller sends the configured key; False where none is configured."""
    given = headers.get(OWN_HEADER) or headers.get("authorization") or ""
    scheme, _, token = given.partition(" ")
    # Starlette reads the bytes of a header as Latin-1; clients send a key as UTF-8.
    sent = token.strip().encode("latin-1", errors="replace")
    same = hmac.compare_digest(sent, (key or "").encode(errors="surrogateescape"))
    return key is not None and scheme.lower() == "bearer" and same


def check_key(headers: Mapping[str, str], key: str | None) -> None:
    """Raise `RequestRefused` unless the caller may change modules."""
    if key is None:
        raise RequestRefused(
            403,
            "this server has no steering key, so nothing can be changed: start "
            f"it with --steering-api-key or {KEY_ENV}",
        )
    if not holds_key(headers, key):
        raise RequestRefused(
            401,
            "found no steering key, or a wrong one, expected Authorization: Bearer KEY "
            "or X-Steering-Authorization: Bearer KEY",
        )


def allowed_path(path: str, roots: Sequence[str]) -> str:
    """The path to load, with symbolic links resolved.

    Args:
        path: from the request: an absolute path, or `hf:owner/repo...`.
        roots: `additional_config.steering.module_roots`.

    Raises:
        RequestRefused: it, or a file that it holds, lies outside every root.
    """
    if not roots:
        raise RequestRefused(
            403,
            "path: this server loads no modules over HTTP: it was started without "
            "additional_config.steering.module_roots",
            "path",
        )
    if ".." in path.replace("\\", "/").split("/"):
        raise RequestRefused(
            400, f"path: found {shown(path)}, expected a path without ..", "path"
        )
    if path.startswith("hf:"):
        return _allowed_repository(path, roots)
    if not os.path.isabs(path):
        raise RequestRefused(
            400,
            f"path: found {shown(path)}, expected an absolute path or hf:owner/repo",
            "path",
        )
    real = os.path.realpath(path)
    if not _inside(real, _folders(roots)):
        raise _outside(path, roots)
    if not os.path.exists(real):
        raise RequestRefused(
            404, f"path: {shown(path)}: no such file or directory", "path"
        )
    _check_entries(path, Path(real), roots)
    return real


def _allowed_repository(path: str, roots: Sequence[str]) -> str:
    for root in roots:
        inside = path.startswith(root if root.endswith(("/", ":")) else f"{root}/")
        # A pinned revision of a whole repository that is a root.
        pinned = path.partition("@")[0] == root
        if root.startswith("hf:") and (inside or pinned):
            return path
    raise _outside(path, roots)


def _folders(roots: Sequence[str]) -> list[str]:
    return [os.path.realpath(root) for root in roots if not root.startswith("hf:")]


def _inside(real: str, folders: Sequence[str]) -> bool:
    return any(
        real == folder or real.startswith(folder.rstrip(os.sep) + os.sep)
        for folder in folders
    )


def _check_entries(path: str, real: Path, roots: Sequence[str]) -> None:
    """Refuse a directory with a link that leaves the roots, or with too many files."""
    if not real.is_dir():
        return
    folders = _folders(roots)
    seen = 0
    for folder, names, files in os.walk(real):
        for name in (*names, *files):
            seen += 1
            if seen > MAX_ENTRIES:
                raise RequestRefused(
                    400,
                    f"path: {shown(path)} holds more than {MAX_ENTRIES} files, "
                    "expected the directory of one module",
                    "path",
                )
            if not _inside(os.path.realpath(os.path.join(folder, name)), folders):
                raise _outside(path, roots)


def _outside(path: str, roots: Sequence[str]) -> RequestRefused:
    return RequestRefused(
        403,
        f"path: {shown(path)} is outside additional_config.steering.module_roots, "
        f"expected a path under one of {listing(roots)}",
        "path",
    )
