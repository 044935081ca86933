# SPDX-License-Identifier: Apache-2.0
"""What a file format says about a module: sites, tensors and how they fold.

A format reads configuration files and tensor headers and returns a `ModuleLayout`.
The layout is plain data; `fold.py` turns it and the tensors into the canonical SAE.
"""

from __future__ import annotations

import itertools
import json
import math
import reprlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vllm.config.steering import ModuleKind, SiteInfo
from vllm.config.steering_json import Json, JsonView
from vllm.config.steering_points import HookPoint, site_name

MAX_CONFIG_BYTES = 4 << 20
# A module has one subdirectory a site. A directory with more entries is no module.
MAX_ENTRIES = 4096
MAX_INT32 = 2**31 - 1
MAX_INTEGER_DIGITS = 40
# How much of a list or an object an excerpt may show.
_EXCERPT = reprlib.Repr()
_EXCERPT.maxlevel, _EXCERPT.maxlist, _EXCERPT.maxdict = 3, 10, 10
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


class LayoutError(ValueError):
    """A module's files cannot be used. The message is one line, without the name."""


@dataclass(frozen=True)
class Overrides:
    """What a list of releases says about an SAE that its own files do not.

    Attributes:
        normalize: the kind of input normalisation, in SAELens's words.
        scale: the factor of `expected_average_only_in`.
        centred: the SAE was trained on a model whose residual stream has mean zero.
    """

    normalize: str | None = None
    scale: float | None = None
    centred: bool = False


@dataclass(frozen=True)
class Location:
    """Where a module's files are.

    `root` is a directory or a single file. `origin` is the path as it was given; some
    formats read the layer from it. `given` is the one site that the operator named, for
    files that do not state theirs; `given_sites` are all that the operator named.
    `listed=False` keeps the names of other files out of messages, for clients that must
    not see them. `overrides` is what a list of releases adds to the files.
    """

    root: Path
    origin: str
    given: tuple[int, HookPoint] | None = None
    given_sites: tuple[tuple[int, HookPoint], ...] = ()
    listed: bool = True
    overrides: Overrides = Overrides()

    def has(self, *names: str) -> bool:
        """Whether the root is a directory that holds all these files."""
        return all((self.root / name).is_file() for name in names)

    def site(
        self, stated: tuple[int, HookPoint] | None, where: str
    ) -> tuple[int, HookPoint]:
        """The site that the files state, or else the one that the operator named.

        Raises:
            LayoutError: neither, or the two differ.
        """
        if stated and self.given and stated != self.given:
            raise LayoutError(
                f"{where}: the files say {site_name(*stated[::-1])}, but sites names "
                f"{site_name(*self.given[::-1])}; leave sites out, or correct it"
            )
        if (site := stated or self.given) is None:
            raise LayoutError(
                f"{where}: expected a layer, found none; name the site, for example "
                'sites=["post_block.20"]'
            )
        return site

    def entries(self) -> list[Path]:
        """The directory's entries by name, or the single file.

        Raises:
            LayoutError: more entries than any module has.
        """
        if not self.root.is_dir():
            return [self.root]
        entries = list(itertools.islice(self.root.iterdir(), MAX_ENTRIES + 1))
        if len(entries) > MAX_ENTRIES:
            raise LayoutError(f"expected a directory of at most {MAX_ENTRIES} entries")
        return sorted(entries)

    def listing(self) -> str:
        """The names of the entries, for messages."""
        if not self.listed:
            return "other files" if self.root.is_dir() else "a file"
        if self.root.is_dir():
            names = [p.name for p in self.entries()]
            more = f" and {len(names) - 12} more" if len(names) > 12 else ""
            return f"a directory with {', '.join(names[:12]) or 'nothing'}{more}"
        return f"the file {self.root.name}"


@dataclass(frozen=True)
class Matrix:
    """A stored matrix; `features_last` says that it is `[D, F]`, not `[F, D]`.

    For `W_skip` it says `[d_in, d_out]`, not `[d_out, d_in]`.
    """

    name: str
    features_last: bool = False


@dataclass(frozen=True)
class Gate:
    """Tensor names of a gated SAE's encoder, each `[F]` (arXiv:2404.16014)."""

    r_mag: str
    b_mag: str
    b_gate: str


@dataclass(frozen=True)
class SAELayout:
    """Where one site's tensors are, and the fold that makes them canonical.

    With `W = W_enc_scale * W_enc` (rows times `exp(r_mag)` where gated) and
    `W' = W_dec_scale * W_dec`, whose row norms are `n` if `unit_decoder_rows` else 1,
    the canonical SAE is
        W_enc = n W,  W_dec = W' / n,  b_dec = b_dec_scale * b_dec,
        b_enc = n * b_enc_scale * b_enc - W_enc b_dec  (canonical W_enc and b_dec),
    the last term only if `subtract_b_dec`: the encoder reads `x - b_dec`. `threshold`
    (a tensor, one number, or its logarithm) applies to the canonical pre-activation and
    is multiplied by `threshold_scale`. `centre_input` makes the encoder read `x -
    mean(x)`: the fold subtracts the mean of each encoder row. A transcoder may have
    `W_skip`, which does not change.
    """

    site: SiteInfo
    file: str
    W_enc: Matrix
    W_dec: Matrix
    b_enc: str | None = "b_enc"
    b_dec: str | None = "b_dec"
    threshold: str | float | None = None
    threshold_is_log: bool = False
    gate: Gate | None = None
    subtract_b_dec: bool = False
    unit_decoder_rows: bool = False
    centre_input: bool = False
    W_enc_scale: float = 1.0
    b_enc_scale: float = 1.0
    W_dec_scale: float = 1.0
    b_dec_scale: float = 1.0
    threshold_scale: float = 1.0
    W_skip: Matrix | None = None


@dataclass(frozen=True)
class VectorLayout:
    """Where one site's steering vector `[D]` is: a tensor, or a row of one `[n, D]`."""

    site: SiteInfo
    file: str
    tensor: str
    row: int | None = None


@dataclass(frozen=True)
class ModuleLayout:
    """Everything that the files of one module state.

    `model` and `declared` (per site name: `fvu`, `l0`) are the author's claims and
    change nothing.
    """

    kind: ModuleKind
    sites: tuple[SAELayout | VectorLayout, ...]
    reference_norm: float | None = None
    skip_token_ids: tuple[int, ...] | None = None
    norm_guard: float | None = None
    model: str | None = None
    declared: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def lfs_pointer(name: str) -> LayoutError:
    """The error for a file that git-lfs has not fetched."""
    return LayoutError(
        f"{name}: expected the file, found a git-lfs pointer to it; run `git lfs pull`"
    )


def _parse_int(digits: str) -> int:
    if len(digits) > MAX_INTEGER_DIGITS:
        raise ValueError(
            f"an integer has {len(digits)} digits, expected at most "
            f"{MAX_INTEGER_DIGITS}"
        )
    return int(digits)


def each_key_once(pairs: list[tuple[str, object]]) -> Json:
    """An object for `json.loads`. Readers differ in which of two equal keys counts.

    Raises:
        ValueError: a key is given twice.
    """
    made = dict(pairs)
    if len(made) < len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"{excerpt(twice)} is given twice, expected once")
    return made


def read_json(path: Path) -> Json:
    """A JSON object from a small file; anything else is a `LayoutError`."""
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise LayoutError(
                f"{path.name}: expected at most {MAX_CONFIG_BYTES} bytes of JSON, "
                f"found {path.stat().st_size}"
            )
        content = path.read_bytes()
        if content.startswith(LFS_POINTER):
            raise lfs_pointer(path.name)
        data = json.loads(
            content.decode(), parse_int=_parse_int, object_pairs_hook=each_key_once
        )
    except LayoutError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise LayoutError(f"{path.name}: cannot be read as JSON: {detail}") from error
    if not isinstance(data, dict):
        raise LayoutError(
            f"{path.name}: expected a JSON object, found {type(data).__name__}"
        )
    return data


def excerpt(value: object) -> str:
    """At most 80 characters of a value, without a look at all of it.

    A few lines of YAML can repeat a list a billion times.
    """
    plain = isinstance(value, (str, int, float))
    found = repr(value) if plain else _EXCERPT.repr(value)
    return found if len(found) <= 80 else found[:77] + "..."


class Fields:
    """Typed reads from a parsed configuration, with the field's path in every error."""

    def __init__(self, data: JsonView, where: str):
        self.data = data
        self.where = where

    def fail(self, key: str, expected: str) -> LayoutError:
        """The error for `key`; it shows what was found."""
        found = excerpt(self.data[key]) if key in self.data else "nothing"
        return LayoutError(f"{self.where}: {key}: expected {expected}, found {found}")

    def integer(
        self, key: str, minimum: int = 0, default: int | None = None
    ) -> int | None:
        """An int of at least `minimum` (and an int32), or the default when absent."""
        value = self.data.get(key)
        if value is None:
            return default
        if type(value) is not int or not minimum <= value <= MAX_INT32:
            raise self.fail(key, f"an integer >= {minimum}")
        return value

    def need_integer(self, key: str, minimum: int = 0) -> int:
        """As `integer`, but the field must be there."""
        value = self.integer(key, minimum)
        if value is None:
            raise self.fail(key, f"an integer >= {minimum}")
        return value

    def number(self, key: str, positive: bool = True) -> float | None:
        """A finite number (positive unless told otherwise), or None when absent."""
        value = self.data.get(key)
        if value is None:
            return None
        expected = "a finite positive number" if positive else "a finite number"
        if type(value) not in (int, float):
            raise self.fail(key, expected)
        try:
            number = float(value)
        except OverflowError:
            raise self.fail(key, expected) from None
        if not math.isfinite(number) or (positive and number <= 0):
            raise self.fail(key, expected)
        return number

    def boolean(self, key: str, default: bool) -> bool:
        """A JSON boolean, or the default when absent."""
        value = self.data.get(key)
        if value is None:
            return default
        if type(value) is not bool:
            raise self.fail(key, "true or false")
        return value

    def text(self, key: str) -> str | None:
        """A string, or None when absent."""
        value = self.data.get(key)
        if value is not None and not isinstance(value, str):
            raise self.fail(key, "a string")
        return value

    def sub(self, key: str) -> Fields:
        """A nested object; an absent one is empty."""
        value = self.data.get(key)
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise self.fail(key, "an object")
        return Fields(value, f"{self.where}: {key}")
