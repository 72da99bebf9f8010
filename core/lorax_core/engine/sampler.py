"""From logits to tokens.

Decides each row by its own settings, whatever its neighbours. Randomness is counter-based: one number in [0, 1) from
(seed, position), so a row gets the same number alone, in any batch and after preemption, and no global state is touched.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
from torch import Tensor

from lorax_core.engine.sequence import Sampling

_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Draw:
    """A row to be decided: its settings and the position, in the sequence, of the token that is drawn."""

    sampling: Sampling
    position: int


def sample(logits: Tensor, draws: SequenceOf[Draw]) -> list[int]:
    """logits `[rows, vocab]` float32 to one token id for each row."""
    greedy = logits.argmax(-1)  # [rows]
    at = [row for row, draw in enumerate(draws) if draw.sampling.temperature > 0]
    if at:
        rows = torch.tensor(at, device=logits.device)
        greedy[rows] = _draw(logits[rows], [draws[row] for row in at])
    chosen: list[int] = greedy.tolist()
    return chosen


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1), the same for the same arguments (the finaliser of splitmix64, applied to each in turn)."""
    state = _mix((seed & _MASK) + 0x9E3779B97F4A7C15)
    state = _mix(state ^ (position * 0xD1342543DE82EF95 & _MASK))
    return (state >> 11) / (1 << 53)


def _draw(logits: Tensor, draws: list[Draw]) -> Tensor:
    """Inverse transform over the tokens in falling order of probability, filters applied: top_k, then top_p, then min_p."""
    settings = [draw.sampling for draw in draws]
    vocab = logits.shape[-1]

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]  # [rows, 1]

    scaled = logits.double() / column([one.temperature for one in settings])
    # A stable order makes equal logits fall the same way in every batch.
    ranked, order = scaled.sort(dim=-1, descending=True, stable=True)
    probabilities = ranked.softmax(-1)  # [rows, vocab]
    rank = torch.arange(vocab, device=logits.device)
    keep = rank < column([one.top_k or vocab for one in settings])
    kept = probabilities.where(keep, 0.0)
    kept = kept / kept.sum(-1, keepdim=True)
    before = kept.cumsum(-1) - kept  # mass in front of each token: the one that crosses top_p stays
    keep &= before < column([one.top_p for one in settings])
    keep &= probabilities >= probabilities[:, :1] * column([one.min_p for one in settings])
    mass = probabilities.where(keep, 0.0).cumsum(-1)
    points = column([uniform(draw.sampling.seed, draw.position) for draw in draws]) * mass[:, -1:]
    # Every filter keeps a front of the order, so the last kept place bounds a draw that rounding pushed to the end.
    picked = torch.minimum((mass <= points).sum(-1), keep.sum(-1) - 1)  # [rows]
    return order.gather(-1, picked[:, None])[:, 0]


def _mix(state: int) -> int:
    state = state & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)
