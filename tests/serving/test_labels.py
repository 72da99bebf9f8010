"""Labels and entities of tokens, from scores that are made up."""

from __future__ import annotations

import numpy as np
from builders import make_letter_tokenizer

from lorax_core.serving.labels import token_labels
from lorax_core.serving.text import TextFront
from lorax_core.types import Task

LABELS = ["O", "B-X", "I-X"]
BEGIN, INSIDE = 1, 2


def labelled(source, best):
    """The classification of a source whose tokens, special ones left out, have these labels."""
    front = TextFront(make_letter_tokenizer())
    encoded = front.encode(source, Task.TOKEN_CLASSIFICATION)
    scores = np.zeros((len(encoded.ids), len(LABELS)), np.float32)
    rows = [at for at, mark in enumerate(encoded.special) if not mark]
    for row, label in zip(rows, best, strict=True):
        scores[row, label] = 1.0
    return token_labels(scores, LABELS, encoded, source, front)


def test_an_entity_ends_with_the_first_of_two_equal_texts():
    text = "ab"

    entities = labelled((text, text), [BEGIN, INSIDE, INSIDE, INSIDE]).entities

    assert [(one.text, one.start, one.end) for one in entities] == [("ab", 0, 2), ("ab", 0, 2)]


def test_entities_of_a_pair_are_quoted_from_their_own_text():
    entities = labelled(("ab", "cd"), [BEGIN, 0, BEGIN, INSIDE]).entities

    assert [one.text for one in entities] == ["a", "cd"]
