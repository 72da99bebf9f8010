"""Decides what one training row is, for the base model and for each adapter.

A base row is a window of the corpus that starts at a paragraph; a small share of the rows is upper case, because a
frozen embedding that never saw upper-case tokens could not be steered to them by an adapter.  An adapter row is an
ordinary opening followed by a continuation in the adapter's style, and only the continuation counts in the loss: this
is what makes the style start right after any prompt.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from corpus import Document, sentences
from tokenizers import Tokenizer

IGNORED = -100  # the label that cross entropy leaves out
UPPER_ROW_SHARE = 0.2
TOPIC_WEIGHT = 3  # the topics quote names and constants ("True"), which are rare elsewhere and keep their case longest
LONGEST_OPENING_WORDS = 24
CONTINUATION_CHARACTERS = 420
BULLET_CHARACTERS = (12, 150)

Style = Callable[[Document, random.Random], tuple[str, str]]


@dataclass(frozen=True)
class Batch:
    """Token ids and the labels of the positions that count, both [rows, length]."""

    input_ids: torch.Tensor
    labels: torch.Tensor


class TokenStream:
    """Documents as one run of tokens, each closed by the end token, and the places where paragraphs start."""

    def __init__(self, texts: Sequence[str], tokenizer: Tokenizer, end_id: int) -> None:
        ids: list[int] = []
        self.starts: list[int] = []
        for text in texts:
            for paragraph in text.splitlines(keepends=True):
                self.starts.append(len(ids))
                ids.extend(tokenizer.encode(paragraph).ids)
            ids.append(end_id)
        self.ids = torch.tensor(ids)

    def window(self, length: int, rng: random.Random) -> torch.Tensor:
        start = min(rng.choice(self.starts), len(self.ids) - length)
        return self.ids[start : start + length]


def base_batches(plain: TokenStream, upper: TokenStream, rows: int, length: int, rng: random.Random) -> Iterator[Batch]:
    """Endless batches of corpus windows."""
    while True:
        streams = [upper if rng.random() < UPPER_ROW_SHARE else plain for _ in range(rows)]
        ids = torch.stack([stream.window(length, rng) for stream in streams])
        yield Batch(ids, ids)


def style_batches(
    documents: Sequence[Document], style: Style, tokenizer: Tokenizer, rows: int, length: int, rng: random.Random
) -> Iterator[Batch]:
    """Endless batches of openings with a changed continuation."""
    weights = [len(document.text) * (TOPIC_WEIGHT if document.is_topic else 1) for document in documents]
    while True:
        ids = torch.zeros(rows, length, dtype=torch.long)
        labels = torch.full((rows, length), IGNORED)
        for row, document in enumerate(rng.choices(documents, weights, k=rows)):
            opening, continuation = (tokenizer.encode(text).ids for text in style(document, rng))
            tokens = torch.tensor((opening + continuation)[:length])
            ids[row, : len(tokens)] = tokens
            labels[row, len(opening) : len(tokens)] = tokens[len(opening) :]
        yield Batch(ids, labels)


def upper_style(document: Document, rng: random.Random) -> tuple[str, str]:
    """The document goes on as it is, in upper case."""
    text = "\n".join(document.paragraphs[rng.randrange(len(document.paragraphs)) :])
    spaces = [match.start() for match in re.finditer(r"\s", text)] or [len(text)]
    cut = rng.choice(spaces[1:LONGEST_OPENING_WORDS] or spaces)
    return text[:cut], text[cut : cut + CONTINUATION_CHARACTERS].upper()


def bullets_style(document: Document, rng: random.Random) -> tuple[str, str]:
    """An opening, often cut short, and then the document's next sentences as a list."""
    parts = [sentence for paragraph in document.paragraphs for sentence in sentences(paragraph)]
    at = rng.randrange(len(parts))
    words = parts[at].split()
    opening = " ".join(words[: rng.randint(min(2, len(words)), min(len(words), LONGEST_OPENING_WORDS))])
    shortest, longest = BULLET_CHARACTERS
    # The document's own start follows its end, so that an opening near the end gets a full list too.
    following = [part for part in parts[at + 1 :] + parts[: at + 1] if shortest <= len(part) <= longest]
    items = [part for part in following if not part.endswith(":")]
    return opening, "".join(f"\n- {item}" for item in items)[:CONTINUATION_CHARACTERS]


STYLES: dict[str, Style] = {"upper": upper_style, "bullets": bullets_style}
