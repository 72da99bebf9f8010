"""Drafting the next tokens, for the model to verify.

Decides what may follow a sequence: what followed the last time that it ended like this, or what an adapter's heads proposed.
A wrong draft token costs a row. Knows nothing of verification.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol


class Drafter(Protocol):
    """What drafts the next tokens of one sequence."""

    def __len__(self) -> int:
        """Tokens of the sequence that it knows."""

    def extend(self, tokens: Iterable[int]) -> None:
        """The tokens after those it knows."""

    def draft(self, limit: int) -> list[int]:
        """Up to `limit` tokens that may follow; none when there is nothing to go by."""


class Proposals:
    """Draft tokens that an adapter's heads proposed, once for each state of the sequence."""

    def __init__(self) -> None:
        self._length = 0
        self._proposed: list[int] = []

    def __len__(self) -> int:
        return self._length

    def extend(self, tokens: Iterable[int]) -> None:
        self._length += len(list(tokens))

    def propose(self, tokens: Sequence[int]) -> None:
        """What may follow the sequence as it is now."""
        self._proposed = list(tokens)

    def draft(self, limit: int) -> list[int]:
        proposed, self._proposed = self._proposed[:limit], []
        return proposed


class PromptLookup:
    """Prompt lookup: the tokens after the latest earlier place with the same last `ngram` tokens.

    Each token is indexed once, so a draft costs the same however long the sequence is.
    """

    def __init__(self, most: int = 8, ngram: int = 3) -> None:
        if ngram < 1 or most < 1:
            raise ValueError(f"a draft needs at least one token to look up and one to give, not {ngram} and {most}")
        self.most = most
        self.ngram = ngram
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # the last tokens to the place after them

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            # Indexed once a token follows it, so that the end of the sequence is never its own precedent.
            if len(self._tokens) >= self.ngram:
                self._after[tuple(self._tokens[-self.ngram :])] = len(self._tokens)
            self._tokens.append(token)

    def draft(self, limit: int) -> list[int]:
        """Up to `limit` tokens; none when the sequence never ended like this before.

        What followed then may reach the end of the sequence itself; then it goes on repeating.
        """
        place = self._after.get(tuple(self._tokens[-self.ngram :]))
        if place is None:
            return []
        length = min(limit, self.most)
        found = self._tokens[place : place + length]
        period = len(self._tokens) - place
        while len(found) < length:
            found.append(found[-period])
        return found
