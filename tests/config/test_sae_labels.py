# SPDX-License-Identifier: Apache-2.0
"""Labels of features: the forms that are read, and what is refused."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm.config.sae_labels import LabelIndex, _loads, labels_of, load_labels

ENTRIES = [
    {"modelId": "m", "layer": "20-res", "index": "5", "description": " the\nbridge "},
    {"index": 7, "description": "a Bridge at night"},
    {"index": "5", "description": "another one"},
]
EXPECTED = {5: "the bridge", 7: "a Bridge at night"}


@pytest.mark.parametrize("form", ["list", "lines", "object"])
def test_each_form_gives_the_same_labels(form: str, tmp_path: Path) -> None:
    text = {
        "list": json.dumps(ENTRIES),
        "lines": "\n".join(json.dumps(entry) for entry in ENTRIES) + "\n\n",
        "object": json.dumps({"5": "the bridge", "7": "a Bridge at night"}),
    }[form]
    (tmp_path / "labels.json").write_text(text)
    assert load_labels(tmp_path / "labels.json") == EXPECTED
    assert labels_of(str(tmp_path)) == EXPECTED
    assert labels_of(str(tmp_path / "elsewhere")) == {}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('[{"description": "x"}]', "index"),
        ('[{"index": true, "description": "x"}]', "index"),
        ('[{"index": "-1", "description": "x"}]', "index"),
        ('[{"index": "\u00b2", "description": "x"}]', "index"),
        ('[{"index": 1, "description": 2}]', "description"),
        ("[3]", "entry 0"),
        ('{"a": "x"}', "entry 'a'"),
        ("not json", "line 1"),
        ("[" * 5000, "line 1"),
    ],
)
def test_what_is_no_label_is_refused_by_its_place(
    text: str, named: str, tmp_path: Path
) -> None:
    (tmp_path / "l.json").write_text(text)
    with pytest.raises(ValueError, match="l.json") as caught:
        load_labels(tmp_path / "l.json")
    assert named in str(caught.value) or "nested" in str(caught.value)


def parsed(loads: Callable[[str], object], text: str) -> object:
    try:
        return repr(loads(text))
    except ValueError:
        return "refused"


VALUES = st.recursive(
    st.none() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=2), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(
    text=VALUES.map(lambda value: json.dumps(value, indent=1)),
    junk=st.text(st.sampled_from('[]{},:"1 \n'), max_size=2),
    at=st.integers(0, 30),
    cut=st.integers(0, 2),
)
def test_entry_by_entry_json_is_what_it_is_at_once(
    text: str, junk: str, at: int, cut: int
) -> None:
    broken = text[:at] + junk + text[at + cut :]
    assert parsed(_loads, text) == parsed(json.loads, text)
    assert parsed(_loads, broken) == parsed(json.loads, broken)


def test_a_search_wants_every_word() -> None:
    index = LabelIndex(EXPECTED)
    assert index.search("BRIDGE", 9) == list(EXPECTED.items())
    assert index.search("night bridge", 9) == [(7, "a Bridge at night")]
    assert index.search("", 1) == [(5, "the bridge")]
    assert LabelIndex({}).search("a", 1) == []


WORDS = st.text(st.sampled_from("abİ \u1e9e"), max_size=4).map(" ".join)


@given(
    labels=st.dictionaries(st.integers(0, 9), WORDS.map(str.strip), max_size=6),
    query=WORDS,
    limit=st.integers(1, 3),
)
def test_a_search_finds_what_a_loop_over_all_labels_finds(
    labels: dict[int, str], query: str, limit: int
) -> None:
    words = query.lower().split()
    every = [
        (feature, label)
        for feature, label in sorted(labels.items())
        if all(word in label.lower() for word in words)
    ]
    assert LabelIndex(labels).search(query, limit) == every[:limit]


def test_half_of_a_surrogate_pair_becomes_a_question_mark(tmp_path: Path) -> None:
    file = tmp_path / "labels.json"
    file.write_text('{"1": "a \\ud800 b", "2": "\\ud83d\\ude00"}')
    assert load_labels(file) == {1: "a ? b", 2: "\U0001f600"}


def test_a_query_of_thousands_of_words_is_no_work() -> None:
    labels = {at: "mentions of the bridge" for at in range(20_000)}
    start = time.process_time()
    index = LabelIndex(labels)
    assert index.search("bridge of " * 50_000 + "zzz", 20) == []
    for _ in range(200):
        assert index.search("bridge zzz", 20) == []
    assert time.process_time() - start < 2.0
