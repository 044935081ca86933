# SPDX-License-Identifier: Apache-2.0
"""What the features of an SAE stand for: labels in the form that Neuronpedia exports.

    [{"index": "457", "description": "mentions of bridges", "layer": "20-res-16k"}, ...]

or one such object a line, or `{"457": "mentions of bridges", ...}`. A module in a local
directory has its labels in `labels.json` there.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from itertools import accumulate
from pathlib import Path

from vllm.config.steering_checks import shown

FILE_NAME = "labels.json"
MAX_BYTES = 256 << 20
# The other file beside a module: what is known of its features.
EVIDENCE_NAME = "evidence.json"
MAX_EVIDENCE = 32 << 20
MAX_LABEL = 1000
MAX_DIGITS = 12  # of a feature's index
_SPACE = re.compile(r"[ \t\n\r]*")

Labels = dict[int, str]
# An entry that is not checked yet: its name in messages, index and description.
_Entry = tuple[str, object, object]


def load_labels(path: str | Path) -> Labels:
    """The labels in a file, by feature index; the first one of a feature counts.

    Raises:
        ValueError: the form is unknown; the message names file and entry.
    """
    file = Path(path)
    if file.stat().st_size > MAX_BYTES:
        size = file.stat().st_size
        raise ValueError(f"{file}: found {size} bytes, expected at most {MAX_BYTES}")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: found no UTF-8 at byte {error.start}") from None
    try:
        content = _loads(text)
    except RecursionError:
        raise ValueError(
            f"{file}: found JSON that is nested too deep, expected a list or an object"
        ) from None
    except ValueError:
        content = [_line(file, at, line) for at, line in _lines(text)]
    if isinstance(content, Mapping) and "index" not in content:
        pairs = ((key, key, value) for key, value in content.items())
        return _collect(file, pairs)
    entries = content if isinstance(content, list) else [content]
    return _collect(file, _described(file, entries))


def _loads(text: str) -> object:
    """`json.loads`, but other threads get their turn after each entry.

    `json.loads` reads a file of 256 MB in one call, during which no other thread runs.
    """
    decode = json.JSONDecoder().raw_decode
    at = _skip(text, 0)
    opening = text[at : at + 1]
    if opening not in ("[", "{"):
        return json.loads(text)
    is_list = opening == "["
    closing = "]" if is_list else "}"
    values: list[object] = []
    keys: list[object] = []
    at = _skip(text, at + 1)
    mark = text[at : at + 1]
    while mark != closing:
        if not is_list:
            key, at = decode(text, at)
            keys.append(key)
            at = _expect(text, _skip(text, at), ":")
        value, at = decode(text, at)
        values.append(value)
        at = _skip(text, at)
        mark = text[at : at + 1]
        if mark != closing:
            at = _expect(text, at, ",")
    if _skip(text, at + 1) != len(text):
        raise ValueError("more than one value")
    if is_list:
        return values
    if not all(isinstance(key, str) for key in keys):
        raise ValueError("a key that is no text")
    return dict(zip(keys, values, strict=True))


def _skip(text: str, at: int) -> int:
    """Where the white space ends that begins here."""
    found = _SPACE.match(text, at)
    assert found is not None
    return found.end()


def _expect(text: str, at: int, mark: str) -> int:
    """Where the next value begins, after a mark that must be here."""
    if not text.startswith(mark, at):
        raise ValueError(f"found no {mark}")
    return _skip(text, at + 1)


def labels_of(path: str) -> Labels:
    """The labels beside a module's files; empty where there are none."""
    folder = Path(path)
    file = folder / FILE_NAME
    return load_labels(file) if folder.is_dir() and file.is_file() else {}


class LabelIndex:
    """Labels in a form that is searched without a look at each of them.

    A server searches for any client. A loop over 100 000 labels would take tenths of a
    second from its other threads.
    """

    def __init__(self, labels: Labels):
        self.labels = labels
        self._features = sorted(labels)
        # A label has no line break.
        lines = [f"{labels[feature].lower()}\n" for feature in self._features]
        self._text = "".join(lines)
        # Where each line starts, and the end.
        self._starts = [0, *accumulate(map(len, lines))]

    def search(self, query: str, limit: int) -> list[tuple[int, str]]:
        """`(feature, label)` of labels that hold every word of the query, by index."""
        words = set(query.lower().split())
        if not words:
            first = self._features[:limit]
            return [(feature, self.labels[feature]) for feature in first]
        if any(word not in self._text for word in words):
            return []
        longest = max(words, key=len)
        found: list[tuple[int, str]] = []
        at = self._text.find(longest)
        while at >= 0 and len(found) < limit:
            line = bisect_right(self._starts, at) - 1
            start, stop = self._starts[line : line + 2]
            label = self._text[start:stop]
            if all(word in label for word in words):
                feature = self._features[line]
                found.append((feature, self.labels[feature]))
            at = self._text.find(longest, stop)
        return found


def _lines(text: str) -> Iterable[tuple[int, str]]:
    return ((at, line) for at, line in enumerate(text.splitlines(), 1) if line.strip())


def _line(file: Path, at: int, line: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError(
            f"{file}: found no JSON in line {at}, expected a list, one object, or one "
            "object a line"
        ) from None


def _described(file: Path, entries: Iterable[object]) -> Iterable[_Entry]:
    for at, entry in enumerate(entries):
        if not isinstance(entry, Mapping):
            raise ValueError(f"{file}: entry {at}: found {shown(entry)}, expected an "
                             "object with index and description")  # fmt: skip
        label = entry.get("description", entry.get("label"))
        yield str(at), entry.get("index"), label


def _collect(file: Path, entries: Iterable[_Entry]) -> Labels:
    labels: Labels = {}
    for name, index, label in entries:
        text = index if isinstance(index, str) else str(index)
        digits = text.isascii() and text.isdigit() and len(text) <= MAX_DIGITS
        if isinstance(index, bool) or not digits:
            raise ValueError(
                f"{file}: entry {shown(name)}: index: found {shown(index)}, expected "
                "a feature index"
            )
        if not isinstance(label, str):
            raise ValueError(
                f"{file}: entry {shown(name)}: description: found {shown(label)}, "
                "expected a text"
            )
        short = " ".join(label.split())[:MAX_LABEL]
        # JSON can hold half of a surrogate pair, and an answer cannot.
        labels.setdefault(int(text), short.encode(errors="replace").decode())
    return labels
