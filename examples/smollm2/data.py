# SPDX-License-Identifier: Apache-2.0
"""Text for the SAE: sampled from the model itself, and prose; then its activations.

A `Corpus` is rows of token ids of equal width. Chat prompts over many topics and
forms are answered by the model at temperature 1; tokens less likely than `MIN_P`
times the likeliest are left out.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

WIDTH = 320  # tokens of a row
NEW_TOKENS = 256
MIN_P = 0.02
# <|endoftext|>, <|im_start|> and <|im_end|>; transformers' releases differ in which of
# them a tokenizer calls special.
CONTROL_IDS = (0, 1, 2)
_TOPICS = """
the Golden Gate Bridge; San Francisco; Paris; New York City; Japan; India; Africa; the
Arctic; the ocean; rivers; mountains; the desert; volcanoes; the moon; space travel;
the planets; black holes; airplanes; trains; ships; bicycles; cars; bridges; castles;
cooking pasta; baking bread; lemon cake; coffee; wine; cheese; chocolate; vegetables;
dogs; cats; horses; birds; insects; whales; dinosaurs; trees; flowers; gardening;
farming; the weather; climate; snow; storms; earthquakes; physics; chemistry;
electricity; mathematics; geometry; probability; biology; genes; evolution; medicine;
hospitals; sleep; the heart; vaccines; psychology; dreams; Python programming; a
sorting algorithm; databases; the internet; robots; artificial intelligence; computer
games; telephones; photography; painting; sculpture; poetry; Shakespeare; novels;
detective stories; horror stories; fairy tales; dragons; pirates; magic; ghosts; jazz
music; the piano; opera; dance; theatre; movies; football; tennis; swimming; chess;
running a marathon; medieval history; ancient Rome; Egypt; the Second World War; the
French Revolution; kings and queens; slavery; elections; democracy; law; police;
prison; money and banks; taxes; business; marketing; factories; workers' rights;
education; children at school; family dinners; love letters; weddings; friendship;
grandmothers; babies; religion; the Bible; Buddhism; philosophy; ethics; happiness;
loneliness; anger; fashion; jewellery; architecture; furniture; holidays; hotels;
French grammar; the Spanish language; German words; Latin; letters and spelling;
jokes; riddles; recipes; time management; job interviews; emails; fitness; nutrition;
recycling; solar energy; water; gold; diamonds; oil; clocks; maps; the colour blue;
numbers
"""
TOPICS = [" ".join(topic.split()) for topic in _TOPICS.split(";")]
FORMS = (
    "Write a long story about {}.",
    "Explain {} in detail.",
    "Write a diary entry that mentions {}.",
    "Give me ten facts about {}.",
    "Write a dialogue about {}.",
    "Write a news article about {}.",
    "Write a poem about {}.",
    "List questions and answers about {}.",
    "Write a formal letter about {}.",
    "What should a beginner know about {}?",
    "Give step-by-step instructions to do with {}.",
    "Write a Python program about {}.",
    "Argue for and against {}.",
    "Écris un texte en français sur {}.",
    "Escribe un texto en español sobre {}.",
)
# Openings outside of a chat: the model continues as on a web page or in a book.
OPENINGS = (
    "The history of {} begins",
    "Today I learned about {}:",
    "Chapter 1. {}",
    "Everything about {} changed when",
)


@dataclass(frozen=True)
class Corpus:
    """Token ids `[rows, WIDTH]` int32, and which of them count, bool alike.

    A token counts if it is no padding, no special token and not a row's first.
    """

    tokens: torch.Tensor
    counts: torch.Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def rows(self, which: slice | torch.Tensor) -> Corpus:
        """Some of the rows."""
        return Corpus(self.tokens[which], self.counts[which])

    def split(self, held_out: int, seed: int) -> tuple[Corpus, Corpus]:
        """Training rows and `held_out` others, chosen at random."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self.rows(order[held_out:]), self.rows(order[:held_out])


def join(*parts: Corpus) -> Corpus:
    """Rows of several corpora."""
    return Corpus(
        torch.cat([p.tokens for p in parts]), torch.cat([p.counts for p in parts])
    )


def make_corpus(tokens: torch.Tensor, tokenizer: Any) -> Corpus:
    """Mark what counts in `tokens [rows, width]`; what follows an eos is padding."""
    ended = (tokens == tokenizer.eos_token_id).cumsum(1)
    # A chat prompt has two ends of messages; padding has many in a row.
    repeated = torch.zeros_like(tokens, dtype=torch.bool)
    repeated[:, 1:] = (ended[:, 1:] > 0) & (tokens[:, 1:] == tokens[:, :-1])
    special = torch.isin(tokens, torch.tensor(CONTROL_IDS))
    counts = ~(special | (repeated & special))
    counts[:, 0] = False
    return Corpus(tokens.to(torch.int32), counts)


def prompts(tokenizer: Any) -> list[list[int]]:
    """Token ids of every topic in every form."""
    asks = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": form.format(topic)}],
            tokenize=False,
            add_generation_prompt=True,
        )
        for topic in TOPICS
        for form in FORMS
    ]
    asks += [form.format(topic) for topic in TOPICS for form in OPENINGS]
    return tokenizer(asks)["input_ids"]


@torch.no_grad()
def sample(
    model: nn.Module,
    tokenizer: Any,
    batches: int,
    batch: int,
    seconds: float,
    new_tokens: int = NEW_TOKENS,
    seed: int = 0,
) -> Corpus:
    """`batches` batches of answers, fewer when `seconds` are over.

    The prompts of a batch have equal length, so that nothing is padded.
    """
    device = next(model.parameters()).device
    picks = torch.Generator().manual_seed(seed)
    noise = torch.Generator(device).manual_seed(seed)
    by_length: dict[int, list[list[int]]] = defaultdict(list)
    for ids in prompts(tokenizer):
        by_length[len(ids)].append(ids)
    lengths = sorted(by_length)
    sizes = torch.tensor([float(len(by_length[n])) for n in lengths])
    rows, start = [], time.perf_counter()
    for _ in range(batches):
        if time.perf_counter() - start > seconds:
            break
        length = lengths[int(torch.multinomial(sizes, 1, generator=picks))]
        bucket = torch.tensor(by_length[length])
        chosen = torch.randint(len(bucket), (batch,), generator=picks)
        ids = bucket[chosen].to(device)
        answers = _continue(model, ids, noise, new_tokens, tokenizer)
        row = torch.full((batch, WIDTH), tokenizer.eos_token_id)
        whole = torch.cat([bucket[chosen], answers.cpu()], dim=1)[:, :WIDTH]
        row[:, : whole.shape[1]] = whole
        rows.append(row)
    return make_corpus(torch.cat(rows), tokenizer)


def _continue(
    model: nn.Module,
    ids: torch.Tensor,
    noise: torch.Generator,
    new_tokens: int,
    tokenizer: Any,
) -> torch.Tensor:
    """`[batch, n]` prompts -> `[batch, new_tokens]` sampled tokens, eos after eos."""
    new, cache = [], None
    ended = torch.zeros(len(ids), 1, dtype=torch.bool, device=ids.device)
    for _ in range(new_tokens):
        out = model(
            input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        cache = out.past_key_values
        p = out.logits[:, -1].float().softmax(-1)
        p = p.where(p >= MIN_P * p.amax(-1, keepdim=True), 0)
        race = torch.empty_like(p).exponential_(generator=noise)
        ids = (p / race).argmax(-1, keepdim=True)
        ids = ids.masked_fill(ended, tokenizer.eos_token_id)
        ended |= ids == tokenizer.eos_token_id
        new.append(ids)
    return torch.cat(new, dim=1)


def tokenize_prose(documents: list[str], tokenizer: Any) -> Corpus:
    """Rows of at most WIDTH tokens; a document starts a row of its own."""
    pieces = [
        torch.tensor(ids[i : i + WIDTH])
        for ids in tokenizer(documents)["input_ids"]
        for i in range(0, len(ids), WIDTH)
        if len(ids) - i >= 32
    ]
    rows = torch.full((len(pieces), WIDTH), tokenizer.eos_token_id)
    for row, piece in zip(rows, pieces, strict=True):
        row[: len(piece)] = piece
    return make_corpus(rows, tokenizer)


@torch.no_grad()
def residuals(
    model: nn.Module, layer: int, corpus: Corpus, batch: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Per batch of rows: the stream after `layer` `[rows, WIDTH, D]`, and `counts`."""
    device = next(model.parameters()).device
    kept: list[torch.Tensor] = []
    hook = model.model.layers[layer].register_forward_hook(
        lambda module, args, output: kept.append(output)
    )
    try:
        for i in range(0, len(corpus), batch):
            model.model(corpus.tokens[i : i + batch].long().to(device), use_cache=False)
            yield kept.pop(), corpus.counts[i : i + batch].to(device)
    finally:
        hook.remove()
