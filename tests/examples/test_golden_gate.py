# SPDX-License-Identifier: Apache-2.0
"""The shipped demo: model, SAE and feature table fit together and do what they say."""

from __future__ import annotations

import importlib
import itertools
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from steering_testing.examples import example
from transformers import AutoModelForCausalLM, AutoTokenizer

EXAMPLE = Path(__file__).parents[2] / "examples" / "golden_gate"
sys.path.insert(0, str(EXAMPLE))
corpus: Any = importlib.import_module("corpus")
demo: Any = example(EXAMPLE / "demo.py")
demo_engine: Any = importlib.import_module("demo_engine")
demo_server: Any = importlib.import_module("demo_server")
jumprelu: Any = importlib.import_module("jumprelu")
train: Any = importlib.import_module("train")

MB = 1 << 20
FRESH_SEED = 424242


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(EXAMPLE / "model")


@pytest.fixture(scope="module")
def model() -> Any:
    path = EXAMPLE / "model"
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def sae() -> Any:
    return jumprelu.JumpReLUSAE.load(EXAMPLE / "sae")


@pytest.fixture(scope="module")
def features() -> dict[str, Any]:
    return demo.load_features()


@pytest.fixture(scope="module")
def fresh(model: Any, tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return train.collect(model, tokenizer, FRESH_SEED, num_batches=4)


def generate(model: Any, tokenizer: Any) -> list[str]:
    """Continuations of prompts about other things; 8 x 32 sampled tokens."""
    texts = []
    for prompt in train.PROMPTS:
        ids = torch.tensor([tokenizer(prompt).input_ids] * 2)
        torch.manual_seed(0)
        out = model.generate(
            ids, do_sample=True, max_new_tokens=32, min_new_tokens=32, temperature=0.7
        )
        texts += tokenizer.batch_decode(
            out[:, ids.shape[1] :], skip_special_tokens=True
        )
    return texts


def test_the_shipped_files_are_small() -> None:
    def size(path: Path) -> int:
        return sum(f.stat().st_size for f in path.rglob("*") if f.is_file())

    assert size(EXAMPLE / "model") <= 2 * MB
    assert size(EXAMPLE / "model") + size(EXAMPLE / "sae") <= 4 * MB


def test_the_tokenizer_is_the_language_of_the_generator(tokenizer: Any) -> None:
    words = corpus.vocabulary()
    assert tokenizer.convert_ids_to_tokens(range(len(tokenizer))) == words


def test_two_topics_may_not_share_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "TOPICS", (*corpus.TOPICS, corpus.TOPICS[3]))
    with pytest.raises(ValueError, match=r"topic 'animals': words used elsewhere"):
        corpus.vocabulary()


def test_text_gets_a_bos_and_unknown_words_become_unk(tokenizer: Any) -> None:
    ids = tokenizer("The submarine sways.").input_ids
    words = tokenizer.convert_ids_to_tokens(ids)
    assert words == ["<bos>", "the", "<unk>", "sways", "."]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the sways."


def test_a_chat_is_rendered_as_the_chats_of_the_corpus(tokenizer: Any) -> None:
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Who are you?"}],
        add_generation_prompt=True,
        return_dict=False,
    )
    expected = ["<bos>", "<user>", "who", "are", "you", "?", "<assistant>"]
    assert tokenizer.convert_ids_to_tokens(ids) == expected


def test_bridge_share_counts_words_and_not_punctuation() -> None:
    assert corpus.bridge_share(["The fog, sways.", "<eos> the owl"]) == 2 / 5


def test_the_grammar_is_fluent_and_shuffled_words_are_not() -> None:
    documents = itertools.islice(corpus.documents(FRESH_SEED), 50)
    texts = [" ".join(d.words) for d in documents if corpus.USER not in d.words]
    shuffled = [word for text in texts for word in text.split()]
    random.Random(0).shuffle(shuffled)
    assert corpus.fluency(texts) == 1.0
    assert corpus.fluency([" ".join(shuffled)]) < 0.4


def test_the_sae_has_the_saelens_layout(model: Any) -> None:
    cfg = json.loads((EXAMPLE / "sae" / "cfg.json").read_text())
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in load_file(EXAMPLE / "sae/sae_weights.safetensors").items()
    }
    d_in, d_sae = cfg["d_in"], cfg["d_sae"]
    assert cfg["architecture"] == "jumprelu"
    assert cfg["metadata"]["hook_name"] == f"blocks.{train.LAYER}.hook_resid_post"
    assert d_in == model.config.hidden_size
    assert shapes == {
        "W_enc": (d_in, d_sae),
        "W_dec": (d_sae, d_in),
        "b_enc": (d_sae,),
        "b_dec": (d_in,),
        "threshold": (d_sae,),
    }


def test_l0_and_fvu_on_fresh_text_are_as_stated(
    sae: Any, fresh: tuple[torch.Tensor, torch.Tensor], features: dict[str, Any]
) -> None:
    l0, fvu = jumprelu.quality(sae, fresh[0])
    assert 5 <= l0 <= 20
    assert fvu <= 0.05
    assert l0 == pytest.approx(features["l0"], rel=0.1)
    assert fvu == pytest.approx(features["fvu"], rel=0.2)


def test_each_topic_has_a_feature_of_its_own_on_fresh_text(
    sae: Any, fresh: tuple[torch.Tensor, torch.Tensor], features: dict[str, Any]
) -> None:
    x, topics = fresh
    active = (sae.encode(x) > 0).float()
    for index, topic in enumerate(corpus.TOPICS):
        feature = features["topics"][topic.name]["feature"]
        inside = active[topics == index, feature].mean()
        outside = active[topics != index, feature].mean()
        assert inside > 0.3, topic.name
        assert outside < inside / 5, topic.name


def test_the_clamp_turns_most_words_to_the_bridge(
    model: Any, tokenizer: Any, sae: Any, features: dict[str, Any]
) -> None:
    skip = train.skip_token_ids(tokenizer)
    plain = generate(model, tokenizer)
    shares = []
    for mode in demo.demo_modes(features)[1:]:
        clamps = {c["feature_idx"]: c["value"] for c in mode.clamps}
        with jumprelu.reconstruct(model, sae, train.LAYER, clamps, skip):
            texts = generate(model, tokenizer)
        shares.append(corpus.bridge_share(texts))
        if not clamps:
            assert corpus.fluency(texts) > 0.9
    reconstruction, weak, strong = shares
    assert corpus.bridge_share(plain) < 0.15
    assert reconstruction < 0.15
    assert 0.4 < weak < strong
    assert strong > 0.6


def next_layer_input(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """What the layer after the SAE's reads, `[1, S, D]`."""
    seen: list[torch.Tensor] = []
    handle = model.model.layers[train.LAYER + 1].register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    with torch.no_grad():
        model(input_ids=ids)
    handle.remove()
    return seen[0]


def test_skipped_tokens_keep_their_stream_and_others_are_reconstructed(
    model: Any, tokenizer: Any, sae: Any
) -> None:
    ids = torch.tensor([tokenizer("the owl sleeps .").input_ids])
    skip = train.skip_token_ids(tokenizer)
    stock = next_layer_input(model, ids)
    with jumprelu.reconstruct(model, sae, train.LAYER, {3: 2.5}, skip):
        edited = next_layer_input(model, ids)
    again = next_layer_input(model, ids)
    acts = sae.encode(stock)
    acts[..., 3] = 2.5
    assert torch.equal(edited[:, 0], stock[:, 0])
    assert torch.allclose(edited[:, 1:], sae.decode(acts)[:, 1:], atol=1e-5)
    assert torch.equal(again, stock)


def test_a_clamp_to_zero_on_silent_features_changes_nothing(sae: Any) -> None:
    x = torch.randn(8, sae.W_dec.shape[1], generator=torch.Generator().manual_seed(0))
    acts = sae.encode(x)
    silent = int((acts.abs().sum(0) == 0).nonzero()[0])
    clamped = acts.clone()
    clamped[:, silent] = 0.0
    assert torch.equal(sae.decode(clamped), sae.decode(acts))


def test_the_demo_sends_the_same_clamps_to_both_front_ends(
    features: dict[str, Any],
) -> None:
    plain, reconstruction, weak, strong = demo.demo_modes(features)
    assert demo_engine.SPECS not in demo_server.extra_body(plain)
    assert demo_server.extra_body(reconstruction)[demo_engine.SPECS] == [
        {"module_name": "golden-gate", "clamps": []}
    ]
    bridge = features["topics"]["bridge"]
    for mode, strength in zip((weak, strong), features["strengths"], strict=True):
        (spec,) = demo_server.extra_body(mode)[demo_engine.SPECS]
        (clamp,) = spec["clamps"]
        assert clamp["feature_idx"] == bridge["feature"]
        assert clamp["value"] == pytest.approx(
            strength * bridge["max_activation"], abs=1e-3
        )


@pytest.mark.slow
@pytest.mark.engine
def test_the_tiers_do_what_the_page_says() -> None:
    page = (EXAMPLE.parents[1] / "docs" / "features" / "steering_tiers.md").read_text()
    done = subprocess.run(
        [sys.executable, str(EXAMPLE / "tiers.py")],
        capture_output=True,
        text=True,
        check=True,
    )
    rows = re.findall(r"^\| (.*?) \| (\d+)% \| (\d+)% \|$", done.stdout, re.MULTILINE)
    found = [(name, int(share), int(fluent)) for name, share, fluent in rows]
    assert len(found) == 14
    said = []
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3 and cells[1].endswith("%"):
            shares, fluencies = (
                [int(n) for n in cell.removesuffix(" %").split(" / ")]
                for cell in cells[1:]
            )
            said += list(zip(shares, fluencies, strict=True))
    said.insert(10, (8, 100))  # `scale` 3 on other topics, which the text mentions
    # Another machine rounds otherwise, and samples other words now and then.
    for (name, share, fluent), (shares, fluencies) in zip(found, said, strict=True):
        assert abs(share - shares) <= 5, name
        assert abs(fluent - fluencies) <= 5, name
