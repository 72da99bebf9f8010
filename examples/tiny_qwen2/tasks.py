"""Decides what the adapters that answer with a label or a vector learn from, and on what they are judged.

`topic` reads a paragraph of the documentation and tells its area, which is that of the file it stands in.  `similar`
reads the two halves of a paragraph and learns to find one by the other.  `relevant` reads a question about an area and a
paragraph, and tells by a number whether the paragraph is of that area.  Knows nothing of models or of training.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from corpus import Document, sentences
from samples import Batch
from tokenizers import Tokenizer

# Name of the area, and how the names of its documents begin.
AREAS: dict[str, tuple[str, ...]] = {
    "numbers": (
        *(f"stdlib/{name}" for name in ("_pydecimal", "fractions", "numbers", "random", "statistics", "colorsys")),
        *(f"topics/{name}" for name in ("binary", "bitwise", "floating", "integers", "numeric", "typesnumeric")),
    ),
    "files": (
        *(f"stdlib/{name}" for name in ("_pyio", "bz2", "filecmp", "fileinput", "genericpath", "glob", "gzip", "lzma")),
        *(
            f"stdlib/{name}"
            for name in ("ntpath", "os.", "pathlib", "posixpath", "shutil", "tarfile", "tempfile", "zip")
        ),
    ),
    "tests": ("stdlib/unittest/", "stdlib/doctest"),
}
LABELS = dict(enumerate(AREAS))
# What somebody asks who looks for something of an area; one of each is asked in tests alone.
QUESTIONS: dict[str, tuple[str, ...]] = {
    "numbers": (
        "How do I round a decimal number?",
        "Which functions draw random numbers?",
        "What is the mean of the values?",
        "How are integers and fractions added?",
        "How precise is floating point arithmetic?",
    ),
    "files": (
        "How do I read the lines of a file?",
        "How can an archive be extracted?",
        "How do I copy a directory?",
        "Where does the path of a temporary file lie?",
        "How do I open and close a file?",
    ),
    "tests": (
        "How do I run the tests of a module?",
        "How does a test case fail?",
        "What does a mock object record?",
        "How do I skip a test?",
        "How do I write a test for a function?",
    ),
}
PARAGRAPHS_HELD_OUT_PERCENT = 20
MOST_TOKENS = 64
SHORTEST_TOPIC_WORDS = 15  # "The default value is None" stands in any area
SHORTEST_HALF_WORDS = 5
CANDIDATES = 50


@dataclass(frozen=True)
class Labelled:
    """A text and the number of its area."""

    text: str
    label: int


@dataclass(frozen=True)
class Pair:
    """Two texts that belong together."""

    left: str
    right: str


def labelled(documents: Sequence[Document], held_out: bool) -> list[Labelled]:
    """The paragraphs of the areas' documents that are, or are not, kept from training.

    Paragraphs are held out one by one and not with their documents: an area of few documents would lose most of itself.
    """
    found = []
    for document in documents:
        for label, prefixes in enumerate(AREAS.values()):
            if document.name.startswith(prefixes):
                long = [text for text in document.paragraphs if len(text.split()) >= SHORTEST_TOPIC_WORDS]
                kept = [text for text in long if _held_out(text) is held_out]
                found += [Labelled(text, label) for text in kept]
    return found


def pairs(documents: Sequence[Document], held_out: bool) -> list[Pair]:
    """The halves of every paragraph that is long enough, of the documents that are, or are not, held out."""
    texts = [text for document in documents if document.held_out is held_out for text in document.paragraphs]
    return [pair for text in texts if (pair := _halves(text)) is not None]


def labelled_batches(examples: Sequence[Labelled], tokenizer: Tokenizer, rows: int, seed: str) -> Iterator[Batch]:
    """Endless batches in which every area is as frequent as any other; a text may start at any of a paragraph's sentences."""
    rng = random.Random(seed)
    by_label = [[example.text for example in examples if example.label == label] for label in LABELS]
    while True:
        drawn = [rng.randrange(len(LABELS)) for _ in range(rows)]
        texts = [rng.choice(by_label[label]) for label in drawn]
        texts = [_from_some_sentence(text, rng) for text in texts]
        yield Batch(padded(texts, tokenizer)[0], torch.tensor(drawn))


def question_batches(examples: Sequence[Labelled], tokenizer: Tokenizer, rows: int, seed: str) -> Iterator[Batch]:
    """Endless batches of questions, each with a paragraph of every area in rows of their own, which stand together.

    The labels `[rows]` are the areas of the questions.
    """
    rng = random.Random(seed)
    by_label = [[example.text for example in examples if example.label == label] for label in LABELS]
    while True:
        areas = [rng.randrange(len(LABELS)) for _ in range(rows)]
        texts = []
        for area in areas:
            question = rng.choice(QUESTIONS[LABELS[area]][:-1])
            texts += [(question, _from_some_sentence(rng.choice(found), rng)) for found in by_label]
        yield Batch(joined(texts, tokenizer), torch.tensor(areas))


def joined(texts: Sequence[tuple[str, str]], tokenizer: Tokenizer) -> torch.Tensor:
    """Token ids `[texts, longest]` of two texts each, one after the other, cut at the most tokens each, padded on the right."""
    rows = [[token for text in both for token in tokenizer.encode(text).ids[:MOST_TOKENS]] for both in texts]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    return ids


def pair_batches(found: Sequence[Pair], tokenizer: Tokenizer, rows: int, seed: str) -> Iterator[Batch]:
    """Endless batches of left halves followed by their right halves; the labels are the places of the last tokens."""
    rng = random.Random(seed)
    while True:
        drawn = rng.sample(found, rows)
        yield Batch(*padded([pair.left for pair in drawn] + [pair.right for pair in drawn], tokenizer))


def padded(texts: Sequence[str], tokenizer: Tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids `[texts, longest]`, cut at the most tokens and padded on the right, and the last token's place in each."""
    rows = [tokenizer.encode(text).ids[:MOST_TOKENS] for text in texts]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    return ids, torch.tensor([len(tokens) - 1 for tokens in rows])


def candidate_groups(found: Sequence[Pair], seed: int) -> list[list[Pair]]:
    """Groups of pairs, shuffled: within one, each left half is to find its right half among all right halves."""
    shuffled = random.Random(seed).sample(found, len(found))
    return [shuffled[at : at + CANDIDATES] for at in range(0, len(found) - CANDIDATES + 1, CANDIDATES)]


def _held_out(text: str) -> bool:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % 100 < PARAGRAPHS_HELD_OUT_PERCENT


def _from_some_sentence(text: str, rng: random.Random) -> str:
    parts = sentences(text)
    tails = [" ".join(parts[at:]) for at in range(len(parts))]
    return rng.choice([tail for tail in tails if len(tail.split()) >= SHORTEST_TOPIC_WORDS])


def _halves(text: str) -> Pair | None:
    """The sentences before and after the middle, or the words where there is one sentence only."""
    parts = sentences(text)
    if len(parts) == 1:
        parts = text.split()
    left, right = " ".join(parts[: len(parts) // 2]), " ".join(parts[len(parts) // 2 :])
    shortest = min(len(left.split()), len(right.split()))
    return Pair(left, right) if shortest >= SHORTEST_HALF_WORDS else None
