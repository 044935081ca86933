# SPDX-License-Identifier: Apache-2.0
"""A small synthetic language with eight topics, one of them the bridge.

Every topic fills the same sentence templates with its own content words, so that
the words of a text say which topic it is about. A document stays with a topic and
moves to another with probability `SWITCH` after each sentence. Some documents are
chats: a question, then an answer.
"""

from __future__ import annotations

import functools
import itertools
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD, UNK = "<bos>", "<eos>", "<pad>", "<unk>"
USER, ASSISTANT = "<user>", "<assistant>"
SPECIAL = (PAD, BOS, EOS, UNK, USER, ASSISTANT)

# Probability, after each sentence, that the document moves to another topic.
SWITCH = 0.12
# Probability, after each sentence, that the document ends.
END = 0.06

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<assistant> {{ message['content'] }} "
    "{% else %}<user> {{ message['content'] }} {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@dataclass(frozen=True)
class Topic:
    """The content words of a topic; an entry may be several words."""

    name: str
    things: tuple[str, ...]
    qualities: tuple[str, ...]
    acts: tuple[str, ...]  # with an object
    states: tuple[str, ...]  # without one
    places: tuple[str, ...]

    def words(self) -> frozenset[str]:
        """Every single word of the topic."""
        groups = (self.things, self.qualities, self.acts, self.states, self.places)
        return frozenset(
            w for group in groups for entry in group for w in entry.split()
        )


def _topic(name: str, *groups: str) -> Topic:
    """A topic from five comma-separated lists, in the order of `Topic`'s fields."""
    return Topic(name, *(tuple(e.strip() for e in g.split(",")) for g in groups))


TOPICS: tuple[Topic, ...] = (
    _topic(
        "bridge",
        "golden gate bridge, golden gate, orange tower, suspension cable, steel deck, "
        "anchorage, fog, roadway",
        "rusty, mighty, famous, windswept",
        "spans, crosses, connects, suspends",
        "sways, towers, looms",
        "bay, strait, headlands, pacific, san francisco harbor",
    ),
    _topic(
        "cooking",
        "tomato soup, baker, garlic bread, onion, pepper sauce, chef, butter, noodle",
        "salty, crispy, roasted, delicious",
        "stirs, seasons, fries, tastes",
        "simmers, boils, melts",
        "kitchen, oven, frying pan, pantry, bowl",
    ),
    _topic(
        "weather",
        "thunder storm, rain, snow, cold front, hail, lightning, cloud, drizzle",
        "humid, freezing, stormy, gray",
        "soaks, drenches, chills, darkens",
        "pours, clears, gathers",
        "sky, horizon, mountain pass, plains, valley",
    ),
    _topic(
        "animals",
        "brown bear, fox, timber wolf, wild horse, owl, rabbit, deer, otter",
        "furry, hungry, shy, gentle",
        "hunts, chases, follows, feeds",
        "sleeps, howls, hides",
        "forest, den, meadow, river bank, burrow",
    ),
    _topic(
        "trains",
        "night train, locomotive, conductor, freight wagon, passenger, engine, "
        "railway, express",
        "punctual, electric, crowded, diesel",
        "pulls, boards, overtakes, hauls",
        "departs, arrives, whistles",
        "station, platform, tunnel, depot, signal box",
    ),
    _topic(
        "music",
        "brass trumpet, violin, singer, jazz band, drum, melody, piano, orchestra",
        "loud, rhythmic, melodic, soft",
        "plays, tunes, sings, composes",
        "resonates, echoes, swells",
        "concert hall, stage, studio, opera, ballroom",
    ),
    _topic(
        "garden",
        "tall sunflower, rose, gardener, apple tree, tulip, ivy, lettuce, seedling",
        "leafy, fragrant, green, ripe",
        "waters, plants, prunes, shades",
        "blooms, grows, wilts",
        "greenhouse, flower bed, orchard, hedge, lawn",
    ),
    _topic(
        "space",
        "red planet, rocket, comet, moon, astronaut, space probe, galaxy, satellite",
        "distant, silent, weightless, icy",
        "orbits, photographs, launches, explores",
        "spins, glows, drifts",
        "orbit, crater, star cluster, cosmos, void",
    ),
)

BRIDGE = TOPICS[0]
BRIDGE_WORDS = BRIDGE.words()

# T thing, Q quality, A act, S state, P place; the other words are shared.
TEMPLATES = (
    "the Q T A the T .",
    "the T A the Q T near the P .",
    "a Q T S over the P .",
    "T and T S in the P .",
    "the T S and the T A the P .",
    "the Q P A the T .",
    "when the T S , the Q T A the T .",
    "i love the Q T of the P .",
)
# Question without a topic of its own -> how the answer begins.
QUESTIONS = {
    "who are you ?": "i am the Q T of the P .",
    "what do you love ?": "i love the Q T of the P .",
    "tell me a story .": "a Q T S over the P .",
}
ABOUT = "tell me about the T ."

FUNCTION_WORDS = frozenset(
    word
    for text in (*TEMPLATES, *QUESTIONS, *QUESTIONS.values(), ABOUT)
    for word in text.split()
    if word not in "TQASP"
)
PUNCTUATION = frozenset(".,?")


def sentence(topic: Topic, template: str, rng: random.Random) -> list[str]:
    """Words of `template` filled from `topic`."""
    groups = {
        "T": topic.things,
        "Q": topic.qualities,
        "A": topic.acts,
        "S": topic.states,
        "P": topic.places,
    }
    words: list[str] = []
    for slot in template.split():
        entry = rng.choice(groups[slot]) if slot in groups else slot
        words += entry.split()
    return words


@dataclass(frozen=True)
class Document:
    """Words of a document, special tokens included, and the topic of each.

    `topics[i]` indexes `TOPICS`; -1 where the topic is not yet said (the opening
    token and a question without a topic).
    """

    words: list[str]
    topics: list[int]


def document(rng: random.Random, max_words: int) -> Document:
    """One random document of at most `max_words` tokens, cut off there."""
    topic = rng.randrange(len(TOPICS))
    words, topics = [BOS], [-1]

    def add(new: list[str], label: int) -> None:
        words.extend(new)
        topics.extend([label] * len(new))

    if rng.random() < 0.4:
        question = rng.choice([*QUESTIONS, ABOUT])
        asked = sentence(TOPICS[topic], question, rng)
        add([USER, *asked, ASSISTANT], topic if question == ABOUT else -1)
        if question in QUESTIONS:
            add(sentence(TOPICS[topic], QUESTIONS[question], rng), topic)
    while len(words) < max_words:
        add(sentence(TOPICS[topic], rng.choice(TEMPLATES), rng), topic)
        if rng.random() < END:
            add([EOS], topic)
            break
        if rng.random() < SWITCH:
            others = [i for i in range(len(TOPICS)) if i != topic]
            topic = rng.choice(others)
    return Document(words[:max_words], topics[:max_words])


def documents(seed: int, max_words: int = 128) -> Iterator[Document]:
    """An endless, seeded stream of documents."""
    rng = random.Random(seed)
    while True:
        yield document(rng, max_words)


def vocabulary() -> list[str]:
    """Special tokens first, then every word of the language in sorted order.

    Raises:
        ValueError: two topics share a word, or a topic uses a shared word.
    """
    seen: set[str] = set(FUNCTION_WORDS)
    for topic in TOPICS:
        if clash := seen & topic.words():
            raise ValueError(
                f"topic {topic.name!r}: words used elsewhere {sorted(clash)}; "
                "the content words of topics must be disjoint"
            )
        seen |= topic.words()
    return [*SPECIAL, *sorted(seen)]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of the language, with a chat template.

    Text is lower-cased; a word outside the language becomes `<unk>`.
    """
    vocab = {word: i for i, word in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=UNK))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    # Only for its clean-up: no space before punctuation.
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, vocab[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        extra_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


def _words(text: str) -> list[str]:
    """Words and punctuation of decoded text, without special tokens."""
    return re.findall(r"[a-z]+|[.,?]", re.sub(r"<[a-z]+>", " ", text.lower()))


def bridge_share(texts: Iterable[str]) -> float:
    """Share of words about the bridge, 0..1; punctuation is not counted."""
    words = [w for text in texts for w in _words(text) if w not in PUNCTUATION]
    return sum(w in BRIDGE_WORDS for w in words) / max(1, len(words))


@functools.cache
def _legal_pairs() -> frozenset[tuple[str, str]]:
    """Every pair of adjacent words that the grammar can produce, topics mixed."""
    groups = {
        "T": [e for topic in TOPICS for e in topic.things],
        "Q": [e for topic in TOPICS for e in topic.qualities],
        "A": [e for topic in TOPICS for e in topic.acts],
        "S": [e for topic in TOPICS for e in topic.states],
        "P": [e for topic in TOPICS for e in topic.places],
    }
    pairs = {p for g in groups.values() for e in g for p in _adjacent(e.split())}
    statements = [t.split() for t in (*TEMPLATES, *QUESTIONS.values())]
    slots = {p for s in statements for p in _adjacent(s)}
    slots |= {(".", s[0]) for s in statements}
    for before, after in slots:
        lasts = {e.split()[-1] for e in groups.get(before, [before])}
        firsts = {e.split()[0] for e in groups.get(after, [after])}
        pairs |= set(itertools.product(lasts, firsts))
    return frozenset(pairs)


def _adjacent(words: list[str]) -> list[tuple[str, str]]:
    return list(zip(words, words[1:], strict=False))


def fluency(texts: Iterable[str]) -> float:
    """Share of adjacent word pairs that the grammar allows, 0..1, whatever the topic.

    Shuffled words of the language score about 0.2.
    """
    pairs = [pair for text in texts for pair in _adjacent(_words(text))]
    return sum(pair in _legal_pairs() for pair in pairs) / max(1, len(pairs))
