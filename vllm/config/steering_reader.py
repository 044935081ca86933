# SPDX-License-Identifier: Apache-2.0
"""Reads what a client wrote into a typed struct, or raises an error that names the
field.

The type annotations are the one definition: msgspec decodes by them and makes the JSON
schema from them. If it refuses, a second and slower reading by the same annotations
finds the first bad field and gives its path, what was found and what was expected. That
reading also converts scalars of NumPy, PyTorch and the like to Python's.

A message describes what a field takes by the text of `expects(...)`, if there is one.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping
from enum import Enum
from typing import Annotated, Any, Generic, SupportsFloat, SupportsIndex, TypeVar

import msgspec
import msgspec.inspect as mi
import numpy as np
import torch

from vllm.config.steering_checks import bad, key_path, refusal
from vllm.config.steering_json import Json
from vllm.config.unicode_text import is_unicode, no_unicode

T = TypeVar("T")

# What the encoder raises for a value that JSON cannot hold.
_ENCODE_ERRORS = (TypeError, ValueError, OverflowError, RecursionError)
_encode = msgspec.msgpack.Encoder().encode


def expects(text: str, **meta: Any) -> msgspec.Meta:
    """Constraints of a field (see `msgspec.Meta`), and how a message says them."""
    return msgspec.Meta(extra={"expected": text}, **meta)


# The decimal form of float32's largest number.
MAX_FLOAT32 = 3.4028235e38
# A number that float32 holds.
Number = Annotated[
    float,
    expects(
        "a finite number within the range of float32",
        ge=-MAX_FLOAT32,
        le=MAX_FLOAT32,
    ),
]


def packed(value: object) -> bytes | None:
    """`value` as bytes that tell 1 from True and 1.0; None if it has other types than
    those of JSON, structs and enums, or is nested too deep."""
    try:
        return _encode(value)
    except _ENCODE_ERRORS:
        return None


class Reader(Generic[T]):
    """Reads one type.

    Args:
        kind: a type with msgspec's annotations.
        root: the name of the value in messages when its path is empty.
    """

    def __init__(self, kind: type[T], root: str = "body"):
        self.decoder = msgspec.msgpack.Decoder(kind)
        self.info = mi.type_info(kind)
        self.root = root

    def read(self, value: object, path: str = "") -> T:
        """The typed value.

        Raises:
            VLLMValidationError: `parameter` is the path of the first bad field.
        """
        data = packed(value)
        if data is not None:
            try:
                return self.decoder.decode(data)
            except (msgspec.MsgspecError, RecursionError):
                pass
        plain = _plain(path, value, self.info, None) if path else self._root(value)
        try:
            return self.decoder.decode(_encode(plain))
        except (msgspec.MsgspecError, *_ENCODE_ERRORS) as error:
            raise refusal(path or self.root, f"cannot be read: {error}") from None

    def _root(self, value: object) -> object:
        if not isinstance(value, (dict, msgspec.Struct)):
            raise bad(self.root, value, _describe(self.info))
        return _plain("", value, self.info, None)


def json_schema(kind: type) -> Json:
    """The JSON schema of a type, with every reference written out."""
    schema = msgspec.json.schema(kind)
    definitions = schema.pop("$defs", {})

    def inline(node: object) -> object:
        if isinstance(node, list):
            return [inline(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return inline(definitions[node["$ref"].rpartition("/")[2]])
        return {key: inline(item) for key, item in node.items()}

    made = inline(schema)
    assert isinstance(made, dict)
    return made


def _plain(path: str, value: object, info: mi.Type, expected: str | None) -> object:
    """`value` in JSON types, or the error of its first field that is not of `info`."""
    if isinstance(info, mi.Metadata):
        words = (info.extra or {}).get("expected")
        return _plain(path, value, info.type, words or expected)
    if isinstance(info, mi.StructType):
        return _plain_struct(path, value, info)
    if isinstance(info, mi.DictType):
        return _plain_dict(path, value, info, expected)
    if isinstance(info, mi.ListType):
        return _plain_list(path, value, info, expected)
    if isinstance(info, mi.UnionType):
        return _plain_union(path, value, info, expected)
    for scalar in (value, _scalar(value, info)):
        if _takes(info, scalar):
            return _number(scalar, info)
    if isinstance(value, str) and not is_unicode(value):
        raise no_unicode(path, value)
    raise bad(path, value, expected or _describe(info))


def _plain_struct(path: str, value: object, info: mi.StructType) -> Json:
    names = [field.encode_name for field in info.fields]
    if isinstance(value, msgspec.Struct) and type(value) is info.cls:
        value = msgspec.structs.asdict(value)
    if not isinstance(value, dict):
        raise bad(path, value, _describe(info))
    for key in value:
        if key not in names:
            raise refusal(
                key_path(path, key), f"unknown field, expected only {', '.join(names)}"
            )
    found = {}
    for field in info.fields:
        name = field.encode_name
        where = f"{path}.{name}" if path else name
        if name in value:
            if value[name] is not msgspec.UNSET:
                found[name] = _plain(where, value[name], field.type, None)
        elif field.required:
            raise refusal(where, f"is missing, expected {_describe(field.type)}")
    return found


def _plain_dict(
    path: str, value: object, info: mi.DictType, expected: str | None
) -> dict[object, object]:
    if not isinstance(value, dict):
        raise bad(path, value, expected or "an object")
    found = {}
    for key, item in value.items():
        where = key_path(path, key)
        found[_plain(where, key, info.key_type, None)] = _plain(
            where, item, info.value_type, None
        )
    return found


def _plain_list(
    path: str, value: object, info: mi.ListType, expected: str | None
) -> list[object]:
    words = expected or _describe(info)
    if isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim == 1:
        value = value.tolist()
    elif isinstance(value, range):
        value = list(value)
    if not isinstance(value, (list, tuple)):
        if _is_one_of(value, info.item_type):
            raise refusal(
                path, f"found a single object, expected {words}: enclose it in [...]"
            )
        raise bad(path, value, words)
    if not _fits_length(info, len(value)):
        raise refusal(path, f"found {len(value)} items, expected {words}")
    return [
        _plain(f"{path}[{at}]", item, info.item_type, None)
        for at, item in enumerate(value)
    ]


def _plain_union(
    path: str, value: object, info: mi.UnionType, expected: str | None
) -> object:
    kinds = {type(_bare(kind)): kind for kind in info.types}
    if value is None and mi.NoneType in kinds:
        return None
    wanted: list[type[mi.Type]] = []
    if isinstance(value, (dict, msgspec.Struct)):
        listed = kinds.get(mi.ListType)
        bare = None if listed is None else _bare(listed)
        if isinstance(bare, mi.ListType) and _is_one_of(value, bare.item_type):
            wanted = [mi.ListType]
        else:
            wanted = [mi.DictType, mi.StructType]
    elif isinstance(value, (list, tuple)):
        wanted = [mi.ListType]
    for kind in wanted:
        if kind in kinds:
            return _plain(path, value, kinds[kind], None)
    left = [kind for kind in info.types if not isinstance(kind, mi.NoneType)]
    if len(left) == 1:
        return _plain(path, value, left[0], expected)
    for kind in left:
        for scalar in (value, _scalar(value, _bare(kind))):
            if _takes(_bare(kind), scalar):
                return _number(scalar, _bare(kind))
    raise bad(path, value, expected or " or ".join(_describe(kind) for kind in left))


def _bare(info: mi.Type) -> mi.Type:
    return _bare(info.type) if isinstance(info, mi.Metadata) else info


def _is_one_of(value: object, item_type: mi.Type) -> bool:
    """Whether `value` looks like one item of a list that holds structs."""
    item = _bare(item_type)
    if not isinstance(item, mi.StructType):
        return False
    if type(value) is item.cls:
        return True
    names = {field.encode_name for field in item.fields}
    return isinstance(value, dict) and bool(value) and names.issuperset(value)


def _scalar(value: object, info: mi.Type) -> object:
    """A scalar of another library as Python's, where the field is a number."""
    try:
        if isinstance(value, (np.generic, np.ndarray, torch.Tensor)):
            return value.item() if value.ndim == 0 else value
        if isinstance(value, Enum):
            return value.value
        if isinstance(value, (bool, str)):
            return value
        if isinstance(value, SupportsIndex):
            return operator.index(value)
        if isinstance(info, mi.FloatType) and isinstance(value, SupportsFloat):
            return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        pass  # the caller refuses the value as it is
    return value


def _number(value: object, info: mi.Type) -> object:
    """A scalar that `info` takes; integers of any size are numbers."""
    is_number = isinstance(info, mi.FloatType) and isinstance(value, int)
    return float(value) if is_number else value  # type: ignore[arg-type]


def _takes(info: mi.Type, value: object) -> bool:
    """Whether a scalar is exactly of the type and within its bounds."""
    if isinstance(info, mi.IntType):
        return type(value) is int and -(2**63) <= value < 2**63 and _within(info, value)
    if isinstance(info, mi.FloatType):
        if type(value) is not int and type(value) is not float:
            return False
        try:
            number = float(value)
        except OverflowError:
            return False
        return math.isfinite(number) and _within(info, number)
    if isinstance(info, mi.StrType):
        return type(value) is str and _fits_text(info, value)
    if isinstance(info, mi.LiteralType):
        return type(value) in (str, int) and value in info.values
    if isinstance(info, mi.BoolType):
        return type(value) is bool
    return isinstance(info, mi.AnyType)


def _within(info: mi.IntType | mi.FloatType, value: float) -> bool:
    return (
        (info.ge is None or value >= info.ge)
        and (info.gt is None or value > info.gt)
        and (info.le is None or value <= info.le)
        and (info.lt is None or value < info.lt)
    )


def _fits_length(info: mi.StrType | mi.ListType, length: int) -> bool:
    return (info.min_length is None or length >= info.min_length) and (
        info.max_length is None or length <= info.max_length
    )


def _fits_text(info: mi.StrType, value: str) -> bool:
    return (
        is_unicode(value)
        and _fits_length(info, len(value))
        and (info.pattern is None or re.search(info.pattern, value) is not None)
    )


_WORDS: Mapping[type[mi.Type], str] = {
    mi.IntType: "an integer",
    mi.FloatType: "a finite number",
    mi.StrType: "a string",
    mi.BoolType: "true or false",
    mi.NoneType: "null",
    mi.DictType: "an object",
    mi.ListType: "a list",
}


def _describe(info: mi.Type) -> str:
    """What a type takes, in words."""
    if isinstance(info, mi.Metadata):
        return (info.extra or {}).get("expected") or _describe(info.type)
    if isinstance(info, mi.LiteralType):
        return "one of " + ", ".join(f'"{value}"' for value in info.values)
    if isinstance(info, mi.StructType):
        names = ", ".join(field.encode_name for field in info.fields)
        return f"an object with {names}"
    if isinstance(info, mi.UnionType):
        return " or ".join(_describe(kind) for kind in info.types)
    return _WORDS.get(type(info), "another value")
