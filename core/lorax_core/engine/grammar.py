"""What constrains the text of one completion.

Decides only the interface; `serving.structured` builds grammars with a library.
"""

from __future__ import annotations

from typing import Protocol


class Grammar(Protocol):
    """The state of one completion in its grammar."""

    def allowed(self) -> bytes:
        """Which tokens may come next, one bit each, the lowest bit of the first byte for token 0. Tokens past the end may not;
        end tokens may where the text may end."""

    def advance(self, token_id: int) -> None:
        """A token was taken."""

    @property
    def complete(self) -> bool:
        """Whether nothing may follow."""

    def copy(self) -> Grammar:
        """The same state, to go its own way."""
