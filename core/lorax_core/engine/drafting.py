"""Guessing the next tokens.

Decides what may follow a text: what followed the last time that it ended like this, or what an adapter's heads proposed. A
wrong guess costs a row. Knows nothing of verification.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol


class Drafter(Protocol):
    """What guesses the next tokens of one text."""

    def __len__(self) -> int:
        """Tokens of the text so far."""

    def extend(self, tokens: Iterable[int]) -> None:
        """The text goes on."""

    def guess(self, limit: int) -> list[int]:
        """Up to `limit` tokens that may follow the text; none without an idea."""


class Proposals:
    """Guesses that somebody else makes, once for each state of the text."""

    def __init__(self) -> None:
        self._length = 0
        self._proposed: list[int] = []

    def __len__(self) -> int:
        return self._length

    def extend(self, tokens: Iterable[int]) -> None:
        self._length += len(list(tokens))

    def propose(self, tokens: Sequence[int]) -> None:
        """What may follow the text as it is now."""
        self._proposed = list(tokens)

    def guess(self, limit: int) -> list[int]:
        proposed, self._proposed = self._proposed[:limit], []
        return proposed


class PromptLookup:
    """Prompt lookup for one text: the tokens after the latest earlier place with the same last `ngram` tokens.

    Each token is indexed once, so a guess costs the same however long the text.
    """

    def __init__(self, most: int = 8, ngram: int = 3) -> None:
        if ngram < 1 or most < 1:
            raise ValueError(f"a guess needs at least one token to look up and one to give, not {ngram} and {most}")
        self.most = most
        self.ngram = ngram
        self._text: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # the last tokens to the place after them

    def __len__(self) -> int:
        return len(self._text)

    def extend(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            # Indexed once a token follows it, so that the end of the text is never its own precedent.
            if len(self._text) >= self.ngram:
                self._after[tuple(self._text[-self.ngram :])] = len(self._text)
            self._text.append(token)

    def guess(self, limit: int) -> list[int]:
        """Up to `limit` tokens; none when the text never ended like this before.

        What followed then may reach the end of the text itself; then it goes on repeating.
        """
        place = self._after.get(tuple(self._text[-self.ngram :]))
        if place is None:
            return []
        length = min(limit, self.most)
        found = self._text[place : place + length]
        period = len(self._text) - place
        while len(found) < length:
            found.append(found[-period])
        return found
