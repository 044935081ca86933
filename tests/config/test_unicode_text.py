# SPDX-License-Identifier: Apache-2.0
"""Half of a surrogate pair is found in JSON of any form, and nothing else is."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vllm.config.strict_json import strict_loads
from vllm.config.unicode_text import holds_halves, refuse_halves
from vllm.exceptions import VLLMValidationError

UNITS = st.sampled_from(["\ud83d", "\udc00", "\udbff", "\U0001f600", "\\", "u", "d"])
TEXT = st.lists(UNITS, max_size=8).map("".join)


def is_whole(data: bytes) -> bool:
    """The definition: what Python reads can be written as UTF-8."""
    try:
        json.dumps(json.loads(data), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


@example(text="\\\ud83d\udc00", encoding="utf-8", ascii_only=True)
@example(text="\\\\ud83d\udc00", encoding="utf-8", ascii_only=True)
@given(
    text=TEXT,
    encoding=st.sampled_from(["utf-8", "utf-16", "utf-16-le", "utf-32-be"]),
    ascii_only=st.booleans(),
)
def test_halves_are_found_without_reading(
    text: str, encoding: str, ascii_only: bool
) -> None:
    written = json.dumps({"a": [text]}, ensure_ascii=ascii_only)
    data = written.encode(encoding, errors="surrogatepass")
    assert holds_halves(data) == (not is_whole(data))


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ("\ud800", "body"),
        ({"prompt": "a\udfff"}, "prompt"),
        ({"a": [1, "", {"b": ["x", "\ud800"]}]}, "a[2].b[1]"),
        ({"a": {"b c": {"\ud800": 1}}}, r"a['b c']['\ud800']"),
    ],
)
def test_the_path_of_the_first_text_is_named(value: Any, path: str) -> None:
    for refuse in (refuse_halves, lambda v: strict_loads(json.dumps(v).encode())):
        with pytest.raises(VLLMValidationError) as caught:
            refuse(value)
        assert caught.value.parameter == path
        assert str(caught.value).startswith(f"{path}: found ")
        assert str(caught.value).endswith("expected Unicode text")
        assert str(caught.value).isascii()


@pytest.mark.parametrize(
    "text", ["", "\0", "\uffff\ufdd0", "\U0010ffff", "\ud7ff\ue000"]
)
def test_any_other_character_is_text(text: str) -> None:
    value = {text: [text]}
    refuse_halves(value)
    for ascii_only in (True, False):
        data = json.dumps(value, ensure_ascii=ascii_only).encode()
        assert not holds_halves(data)
        assert strict_loads(data) == value
