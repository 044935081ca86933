# SPDX-License-Identifier: Apache-2.0
"""Files that are almost right: they load, or are refused in one line, and soon."""

from __future__ import annotations

import json
import pickle
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sae_reference import D, F, new_weights, tensor, write_json
from safetensors.torch import save_file
from test_sae_loader_security import (
    RES,
    dictionary,
    gemma_scope,
    good_state,
    make_native,
    pickled_dict,
    torch_file,
)

from vllm.config.sae_labels import load_labels
from vllm.entrypoints.serve.steering import evidence
from vllm.entrypoints.serve.steering.access import RequestRefused
from vllm.model_executor.model_loader.sae_loader import (
    inspect_module,
    load_site,
    load_vectors,
)

W, b_enc, b_dec = tensor(F, D, seed=0), tensor(F, seed=1), tensor(D, seed=2)
LONGEST_S = 5.0
FUZZED = settings(max_examples=60)


def make_vectors(root: Path) -> Path:
    save_file({"1.resid_post": b_dec}, root / "v.safetensors")
    return root / "v.safetensors"


def make_gguf(root: Path) -> Path:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(root / "c.gguf", "controlvector")
    writer.add_tensor("direction.1", b_dec.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return root / "c.gguf"


def make_transcoder_set(root: Path) -> Path:
    (root / "t").mkdir()
    tensors = {"W_enc": W, "b_enc": b_enc, "W_dec": W.clone(), "b_dec": b_dec}
    save_file(tensors, root / "t/layer_1.safetensors")
    (root / "t/config.yaml").write_text("feature_input_hook: mlp.hook_in\n")
    return root / "t"


def make_sae_lens(root: Path) -> Path:
    (root / "s").mkdir()
    tensors = {"W_enc": W.T.contiguous(), "b_enc": b_enc, "W_dec": W, "b_dec": b_dec}
    save_file(tensors, root / "s/sae_weights.safetensors")
    metadata = {"hook_name": "blocks.1.hook_resid_post", "model_name": "tiny"}
    config = {"architecture": "standard", "d_in": D, "d_sae": F, "dtype": "float32"}
    write_json(root / "s/cfg.json", {**config, "metadata": metadata})
    return root / "s"


def make_npy(root: Path) -> Path:
    np.save(root / "v.npy", b_dec.numpy())
    return root / "v.npy"


def make_vector_pt(root: Path) -> Path:
    torch.save(b_dec, root / "v.pt")
    return root / "v.pt"


MAKERS: list[Callable[[Path], Path]] = [
    make_sae_lens,
    make_npy,
    make_vector_pt,
    make_transcoder_set,
    make_native,
    make_vectors,
    make_gguf,
    lambda root: gemma_scope(root / RES),
    lambda root: dictionary(root / "d", good_state()),
]


# A bare array says nothing of its site.
SITED = {"v.npy": {"sites": ["post_block.1"]}, "v.pt": {"sites": ["post_block.1"]}}


def loads_or_refuses(path: Path) -> bool:
    """Whether the module loads; otherwise it is refused in one line, within seconds."""
    start = time.monotonic()
    try:
        module = inspect_module("m", str(path), **SITED.get(path.name, {}))
        for site in module.sites:
            if module.kind == "sae":
                load_site(module, site, new_weights(site))
            else:
                load_vectors(module, site)
    except ValueError as error:
        assert str(error).startswith("steering module 'm'")
        assert "\n" not in str(error)
        assert len(str(error)) < 2000
        return False
    finally:
        assert time.monotonic() - start < LONGEST_S
    return True


@pytest.mark.parametrize("make", MAKERS)
def test_what_is_fuzzed_loads(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    assert loads_or_refuses(make(tmp_path))


@pytest.mark.parametrize("make", MAKERS)
@given(data=st.data())
@FUZZED
def test_a_corrupted_file_loads_or_is_a_value_error(
    tmp_path_factory: pytest.TempPathFactory,
    make: Callable[[Path], Path],
    data: st.DataObject,
) -> None:
    path = make(tmp_path_factory.mktemp("fuzz"))
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    victim = data.draw(st.sampled_from(files))
    content = bytearray(victim.read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    for _ in range(data.draw(st.integers(0, 4))):
        if content:
            where = data.draw(st.integers(0, len(content) - 1))
            content[where] = data.draw(st.integers(0, 255))
    victim.write_bytes(content)
    loads_or_refuses(path)


# Numbers on either side of every limit, names that mean something, and nesting.
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-2, 70)
    | st.sampled_from([2**31, 2**63, 10**40, -(10**40), 1e308, 5e-324, 4096])
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(
        ["../x", "/etc", "topk", "relu", "blocks.9.hook_resid_post", "float16"]
    )
)
JSON = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
CONFIGURED = [make_sae_lens, make_native, make_transcoder_set]
CONFIGURED += [lambda root: dictionary(root / "d", good_state())]
CONFIGS = ("cfg.json", "manifest.json", "config.json", "config.yaml")


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in a document."""
    found = [path]
    children: Any = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        children = enumerate(value)
    for key, inner in children:
        found += places(inner, (*path, key))
    return found


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """The document with another value at a path."""
    if not path:
        return new
    copy = value.copy()
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


@pytest.mark.parametrize("make", CONFIGURED)
@given(data=st.data())
@FUZZED
def test_any_configuration_loads_or_is_a_value_error(
    tmp_path_factory: pytest.TempPathFactory,
    make: Callable[[Path], Path],
    data: st.DataObject,
) -> None:
    """JSON is YAML, too."""
    path = make(tmp_path_factory.mktemp("fuzz"))
    (file,) = (path / name for name in CONFIGS if (path / name).exists())
    document = {"feature_input_hook": "mlp.hook_in"}
    if file.suffix == ".json":
        document = json.loads(file.read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.sampled_from(places(document)))
        document = replaced(document, at, data.draw(JSON))
    text = json.dumps(document)
    if data.draw(st.booleans()) and text.startswith("{") and len(text) > 2:
        key = data.draw(st.sampled_from(list(document)))
        twice = json.dumps({key: data.draw(JSON)})[1:-1]
        text = f"{{{twice}, {text[1:]}"
    file.write_text(text)
    loads_or_refuses(path)


@given(
    kinds=st.lists(st.integers(0, 14), max_size=5),
    lengths=st.lists(st.sampled_from([0, 1, 2, 2**16, 2**31, 2**63]), min_size=5),
    counts=st.tuples(*[st.sampled_from([0, 1, 2, 2**20, 2**60])] * 2),
    tail=st.binary(max_size=64),
)
@FUZZED
def test_any_gguf_header_is_refused_within_its_size(
    tmp_path_factory: pytest.TempPathFactory,
    kinds: list[int],
    lengths: list[int],
    counts: tuple[int, int],
    tail: bytes,
) -> None:
    """Values of any type with any declared length, arrays of arrays among them."""
    content = b"GGUF" + struct.pack("<IQQ", 3, *counts)
    for kind, length in zip(kinds, lengths, strict=False):
        content += struct.pack("<Q1sI", 1, b"k", kind)
        content += struct.pack("<IQ", 9, length) if kind == 9 else b""
        content += struct.pack("<Q", length)
    path = tmp_path_factory.mktemp("fuzz") / "v.gguf"
    path.write_bytes(content + tail)
    assert not loads_or_refuses(path)


PICKLED = st.recursive(
    st.none() | st.integers(-(2**70), 2**70) | st.text(max_size=4) | st.binary(),
    lambda inner: (
        st.tuples(inner, inner)
        | st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(key=PICKLED, doublings=st.integers(0, 80), content=PICKLED)
@FUZZED
def test_any_pickle_is_refused_before_a_key_is_hashed(
    tmp_path_factory: pytest.TempPathFactory, key: Any, doublings: int, content: Any
) -> None:
    """Tuples that contain themselves twice take 2^n steps to hash."""
    for _ in range(doublings):
        key = (key, key)
    root = tmp_path_factory.mktemp("fuzz")
    for at, data in enumerate([pickled_dict(key), pickle.dumps(content, protocol=2)]):
        path = torch_file(root / str(at), data)
        assert not loads_or_refuses(path)


LABELS = [{"index": 5, "description": "a"}, {"index": "6", "label": "b"}]
EVIDENCE = {
    "card": {"fvu": 0.1},
    "neuronpedia": "x/y",
    "sites": {"post_block.1": {"fvu": 0.1}},
    "max": [1.0, 2.0],
    "p99": [1.0, 2.0],
    "frequency": [0.1, 0.2],
    "contexts": {"1": [["a", "b", "c"]]},
}


@st.composite
def near(draw: st.DrawFn, document: Any) -> bytes:
    """Bytes of a document that differs in a few places, or of another one."""
    for _ in range(draw(st.integers(0, 3))):
        document = replaced(
            document, draw(st.sampled_from(places(document))), draw(JSON)
        )
    text = json.dumps(document)
    return text.encode()[: draw(st.integers(0, 2 * len(text)))]


@example(content=b'{"1234567890123": "a"}')
@given(content=near(LABELS) | near({"5": "a"}) | st.binary(max_size=30))
@FUZZED
def test_any_labels_are_read_or_refused_with_the_files_name(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "l.json"
    path.write_bytes(content)
    try:
        labels = load_labels(path)
    except ValueError as error:
        assert "l.json" in str(error)
    else:
        assert all("\n" not in text for text in labels.values())
        # No other feature's than those that the file names.
        assert all(str(index).encode() in content for index in labels)


@given(content=near(EVIDENCE) | st.binary(max_size=30))
@example(content=b'{"max": [NaN]}')
@example(content=b'{"card": {"fvu": -1e999}}')
@FUZZED
def test_any_evidence_is_an_answer_in_json_or_refused(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    root = tmp_path_factory.mktemp("fuzz")
    (root / evidence.EVIDENCE_NAME).write_bytes(content)
    try:
        found = evidence.of_features(str(root), [0, 1, 7])
    except RequestRefused as refused:
        assert evidence.EVIDENCE_NAME in refused.message
    else:
        json.dumps(found, allow_nan=False)
