"""The token sequences that checks run on.

Decides their lengths and ids, all from one seed. Knows nothing of models.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

# Past 256: tables that are too short, and positions in bfloat16, are right until there.
LONGEST = 288
# 1 and 2 are edges, 17 is one past the usual page of 16.
_LENGTHS = (1, 2, 5, 17, 40)


@dataclass(frozen=True, slots=True)
class Input:
    """One sequence: token ids and, running parallel, token types."""

    ids: tuple[int, ...]
    types: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def with_id(self, at: int, token: int) -> Input:
        """The same input with another token in one place."""
        return Input((*self.ids[:at], token, *self.ids[at + 1 :]), self.types)


def make_inputs(*, vocab: int, types: int, max_tokens: int, pad: int | None, seed: int = 0) -> list[Input]:
    """Inputs of one token, of a few, and of as many as the model takes (288 at most), the last one.

    One input has the padding id inside and at its end, as a real token: the reference sees ids, not intentions.
    """
    chosen = random.Random(seed)
    longest = min(max_tokens, LONGEST)
    # Shorter than the longest only, which is added at the end and must be there once.
    lengths = [length for length in _LENGTHS if length < longest]
    # Padding goes in on purpose only, further below: some architectures give it no position.
    ids = [token for token in range(vocab) if token != pad]
    inputs = [_make(chosen, ids, types, length) for length in (*lengths, longest)]
    if pad is not None and longest > 9:
        tokens = _make(chosen, ids, types, 9)
        # In the middle: the last input must stay the longest.
        inputs.insert(3, tokens.with_id(4, pad).with_id(8, pad))
    return inputs


def _make(chosen: random.Random, ids: list[int], types: int, length: int) -> Input:
    edge = chosen.randint(0, length)  # token types come in two runs, as those of a pair of inputs
    second = [chosen.randrange(types) for _ in range(2)]
    return Input(
        tuple(chosen.choices(ids, k=length)),
        tuple(second[0] if at < edge else second[1] for at in range(length)),
    )
