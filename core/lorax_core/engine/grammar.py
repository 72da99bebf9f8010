"""What constrains the text of one completion.

Decides only the interface; `serving.structured` builds grammars with a library.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Grammar(Protocol):
    """The state of one completion in its grammar."""

    def allowed(self) -> NDArray[np.bool_]:
        """Which tokens may come next: `[vocab]`; end tokens where the text may end."""

    def advance(self, token_id: int) -> None:
        """A token was taken."""

    @property
    def complete(self) -> bool:
        """Whether nothing may follow."""

    def copy(self) -> Grammar:
        """The same state, to go its own way."""
