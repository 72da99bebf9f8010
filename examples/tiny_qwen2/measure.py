"""Decides how good the small model is: held-out perplexity, known words, and what each adapter visibly changes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from corpus import words

PROMPTS = (
    "The list of files",
    "If the file does not exist",
    "Python is a language",
    "The function returns",
    "This module provides",
    "When an exception is raised",
    "A string is",
    "The first argument",
    "Every class has",
    "To open a connection",
    "The server",
    "In the body of a function",
    "An iterator",
    "Read the next line",
    "The dictionary",
    "This method is called when",
    "A list of names",
    "The user",
    "Before the program starts",
    "The value of the variable",
)
WORD_TOKENS = 64
UPPER_TOKENS = 64
BULLET_TOKENS = 96


@dataclass(frozen=True)
class Checkpoint:
    """A model with the tokenizer that belongs to it."""

    model: Any
    tokenizer: Any

    def greedy(self, prompt: str, tokens: int) -> str:
        """The continuation of at most so many tokens, each the most likely one."""
        ids = self.tokenizer(prompt, return_tensors="pt")
        with torch.inference_mode():
            output = self.model.generate(**ids, max_new_tokens=tokens, do_sample=False)
        return str(self.tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))

    def continuations(self, tokens: int, prompts: Sequence[str] = PROMPTS) -> list[str]:
        return [self.greedy(prompt, tokens) for prompt in prompts]


def perplexity(checkpoint: Checkpoint, ids: torch.Tensor, window: int) -> tuple[float, int]:
    """Per-token perplexity over a run of tokens in windows that overlap by half, and how many tokens were scored.

    Each window after the first scores only its second half, so a token has at least half a window of context.
    """
    total, scored = 0.0, 0
    for start in range(0, max(1, len(ids) - window // 2), window // 2):
        row = ids[start : start + window]
        skip = window // 2 - 1 if start else 0
        with torch.inference_mode():
            logits = checkpoint.model(input_ids=row[None, :-1]).logits[0, skip:]
        total += F.cross_entropy(logits, row[1 + skip :], reduction="sum").item()
        scored += len(row) - 1 - skip
    return math.exp(total / scored), scored


def known_word_share(texts: Iterable[str], vocabulary: frozenset[str]) -> float:
    """The share of words that occur in the corpus; a word that the last token may have cut short counts as it is."""
    found = [word for text in texts for word in words(text)]
    return sum(word in vocabulary for word in found) / len(found)


def upper_share(text: str) -> float:
    """The share of the letters that are upper case."""
    letters = [character for character in text if character.isalpha()]
    return sum(letter.isupper() for letter in letters) / max(1, len(letters))


def bullet_lines(text: str) -> tuple[int, int]:
    """How many lines start with "- ", and how many lines are not empty."""
    lines = [line for line in text.splitlines() if line.strip()]
    return sum(line.startswith("- ") for line in lines), len(lines)


def bullet_share(text: str) -> float:
    """The share of the non-empty lines that start with "- "."""
    bullets, lines = bullet_lines(text)
    return bullets / max(1, lines)


def repeated_share(text: str, length: int = 4) -> float:
    """The share of word runs of that length that were in the text before: near 0 for prose, near 1 for a loop."""
    found = words(text)
    runs = [tuple(found[i : i + length]) for i in range(len(found) - length + 1)]
    return 1 - len(set(runs)) / max(1, len(runs))


def folder_bytes(folder: Path) -> int:
    """The size of every file below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
