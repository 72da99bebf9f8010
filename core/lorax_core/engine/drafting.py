"""Guessing the next tokens from the text itself.

Decides what may follow: whatever followed the last time that the text ended like this. Costs no model; a wrong guess costs a
row. Knows nothing of verification.
"""

from __future__ import annotations

from collections.abc import Iterable


class Drafter:
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
        """Tokens of the text so far."""
        return len(self._text)

    def extend(self, tokens: Iterable[int]) -> None:
        """The text goes on."""
        for token in tokens:
            # Indexed once a token follows it, so that the end of the text is never its own precedent.
            if len(self._text) >= self.ngram:
                self._after[tuple(self._text[-self.ngram :])] = len(self._text)
            self._text.append(token)

    def guess(self, limit: int) -> list[int]:
        """Up to `limit` tokens that may follow the text; none when it never ended like this before.

        What followed may reach the end of the text itself; then it goes on repeating.
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
