# SPDX-License-Identifier: Apache-2.0
"""What the features of an SAE stand for: labels in the form that Neuronpedia exports.

    [{"index": "457", "description": "mentions of bridges", "layer": "20-res-16k"}, ...]

or one such object a line, or `{"457": "mentions of bridges", ...}`. A module in a local
directory has its labels in `labels.json` there.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from itertools import accumulate
from pathlib import Path

from vllm.config.steering_checks import shown

FILE_NAME = "labels.json"
MAX_BYTES = 256 << 20
MAX_LABEL = 1000
MAX_DIGITS = 12  # of a feature's index

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
        content = json.loads(text)
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
