"""From logits to tokens.

Decides each row by its own settings, whatever its neighbours. Randomness is counter-based: one number in [0, 1) from
(seed, choice, position), so a row gets the same number alone, in any batch, after preemption and with or without guesses,
and no global state is touched.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorax_core.engine.sequence import Sampling
from lorax_core.types import TokenLogprobs

_MASK = (1 << 64) - 1
# Filters keep few tokens as a rule: they look at this many of the likeliest first, and at all only when that was too few.
_CANDIDATES = 1024


@dataclass(frozen=True, slots=True)
class Draw:
    """A row to be decided.

    `position` is that of the drawn token in its sequence. `seen` are the tokens before it and how often each was generated
    (0 for those of the prompt alone), where penalties ask. `banned` tokens cannot be drawn; `allowed` `[vocab]` bool says
    what a grammar lets through.
    """

    sampling: Sampling
    position: int
    seen: dict[int, int] | None = None
    banned: frozenset[int] = frozenset()
    allowed: NDArray[np.bool_] | None = None


@dataclass(frozen=True, slots=True)
class Picked:
    """A decided row; `token_id` None says that the row had no token to give, for the reason in `fault`."""

    token_id: int | None
    logprobs: TokenLogprobs | None = None
    fault: str = ""


def sample(logits: Tensor, draws: SequenceOf[Draw]) -> list[Picked]:
    """logits `[rows, vocab]` float32 to a token for each row."""
    adjusted = _adjusted(logits, draws)  # [rows, vocab]
    best, greedy = adjusted.max(-1)  # [rows]
    chosen: list[int] = greedy.tolist()
    faults = _faults(logits, best)
    plain: list[int] = []
    filtered: list[int] = []
    for row, draw in enumerate(draws):
        if draw.sampling.temperature > 0 and not faults[row]:
            (filtered if _filters(draw.sampling) else plain).append(row)
    for rows, pick in ((plain, _draw), (filtered, _draw_filtered)):
        if rows:
            tokens = pick(adjusted[torch.tensor(rows, device=logits.device)], [draws[row] for row in rows])
            for row, token in zip(rows, tokens.tolist(), strict=True):
                chosen[row] = token
    scores = score(logits, chosen, [None if faults[row] else draw.sampling.logprobs for row, draw in enumerate(draws)])
    return [
        Picked(None, fault=faults[row]) if faults[row] else Picked(chosen[row], scores[row])
        for row in range(len(draws))
    ]


def score(logits: Tensor, tokens: SequenceOf[int], tops: SequenceOf[int | None]) -> list[TokenLogprobs | None]:
    """Logprobs of `tokens` in logits `[rows, vocab]`, with the `tops[row]` likeliest; None where `tops` has None."""
    found: list[TokenLogprobs | None] = [None] * len(tokens)
    wanted = [row for row, top in enumerate(tops) if top is not None]
    if not wanted:
        return found
    at = torch.tensor(wanted, device=logits.device)
    logprobs = logits[at].log_softmax(-1)  # [wanted, vocab]
    own = logprobs.gather(-1, torch.tensor([[tokens[row]] for row in wanted], device=logits.device))[:, 0].tolist()
    most = max(top for top in tops if top is not None)
    values, ids = logprobs.topk(min(most, logprobs.shape[-1]), dim=-1)
    for place, (row, top_values, top_ids) in enumerate(zip(wanted, values.tolist(), ids.tolist(), strict=True)):
        count = tops[row] or 0
        top = dict(zip(top_ids[:count], top_values[:count], strict=True))
        found[row] = TokenLogprobs(tokens[row], own[place], top)
    return found


def uniform(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1), the same for the same arguments (the finaliser of splitmix64, applied to each in turn)."""
    state = _mix((seed & _MASK) + 0x9E3779B97F4A7C15)
    state = _mix(state ^ (choice * 0xBF58476D1CE4E5B9 & _MASK))
    state = _mix(state ^ (position * 0xD1342543DE82EF95 & _MASK))
    return (state >> 11) / (1 << 53)


def _adjusted(logits: Tensor, draws: SequenceOf[Draw]) -> Tensor:
    """Bias, penalties, bans and grammars applied, row by row; logits themselves where no row asks for any."""
    rows: list[int] = []
    tokens: list[int] = []
    values: list[float] = []
    for row, draw in enumerate(draws):
        for token, value in _changes(draw, logits[row] if draw.seen else None):
            rows.append(row)
            tokens.append(token)
            values.append(value)
    masks = [row for row, draw in enumerate(draws) if draw.allowed is not None]
    if not rows and not masks:
        return logits
    adjusted = logits.clone()
    if rows:
        at = torch.tensor(rows, device=logits.device), torch.tensor(tokens, device=logits.device)
        adjusted.index_put_(at, torch.tensor(values, device=logits.device, dtype=logits.dtype), accumulate=True)
    for row in masks:
        allowed = torch.from_numpy(draws[row].allowed).to(logits.device)
        adjusted[row].masked_fill_(~allowed, float("-inf"))
    return adjusted


def _changes(draw: Draw, logits: Tensor | None) -> list[tuple[int, float]]:
    """What is added to single logits of a row."""
    one = draw.sampling
    changes = [*one.logit_bias, *((token, float("-inf")) for token in draw.banned)]
    if logits is None or not draw.seen:
        return changes
    seen = list(draw.seen)
    found = logits[torch.tensor(seen, device=logits.device)].tolist()
    for token, value in zip(seen, found, strict=True):
        # The factor pushes down whatever the sign; the other two count only what was generated, as OpenAI's do.
        repeated = value / one.repetition_penalty if value > 0 else value * one.repetition_penalty
        count = draw.seen[token]
        counted = one.frequency_penalty * count + (one.presence_penalty if count else 0.0)
        changes.append((token, repeated - value - counted))
    return changes


def _faults(logits: Tensor, best: Tensor) -> list[str]:
    """Why a row cannot be decided; empty strings for sound rows. `best` `[rows]` is the highest adjusted logit."""
    sound = logits.amax(-1).isfinite().tolist()  # a NaN anywhere in a row is its maximum
    open_ = (best > float("-inf")).tolist()
    return [
        "" if ok and some else "the model gave NaN or infinite logits" if not ok else "no token is allowed here"
        for ok, some in zip(sound, open_, strict=True)
    ]


def _filters(one: Sampling) -> bool:
    return one.top_k is not None or one.top_p < 1 or one.min_p > 0 or one.typical_p < 1


def _column(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]  # [rows, 1]


def _points(draws: list[Draw], like: Tensor) -> Tensor:
    return _column([uniform(draw.sampling.seed, draw.sampling.choice, draw.position) for draw in draws], like)


def _scaled(logits: Tensor, draws: list[Draw]) -> Tensor:
    """Logits over their temperatures, the largest at 0: no temperature above 0 is too small."""
    below = logits.double() - logits.amax(-1, keepdim=True)
    return below / _column([draw.sampling.temperature for draw in draws], logits)


def _draw(logits: Tensor, draws: list[Draw]) -> Tensor:
    """Inverse transform over the whole vocabulary, in its order."""
    scaled = _scaled(logits, draws)
    mass = scaled.softmax(-1).cumsum(-1)  # [rows, vocab]
    picked = (mass <= _points(draws, logits) * mass[:, -1:]).sum(-1)
    # Rounding may push a draw past the last token that has mass.
    return torch.minimum(picked, (mass < mass[:, -1:]).sum(-1))


def _draw_filtered(logits: Tensor, draws: list[Draw]) -> Tensor:
    """Inverse transform over the tokens that top_k, top_p, min_p and typical_p leave, likeliest first."""
    scaled = _scaled(logits, draws)
    total = scaled.logsumexp(-1, keepdim=True)
    for count in (min(_CANDIDATES, logits.shape[-1]), logits.shape[-1]):
        ranked, order = scaled.topk(count, dim=-1)
        probabilities = (ranked - total).exp()  # [rows, count]
        keep = _kept(probabilities, [draw.sampling for draw in draws])
        if count == logits.shape[-1] or not bool(keep[:, -1].any()):
            break
    if any(draw.sampling.typical_p < 1 for draw in draws):
        keep &= _typical(probabilities.where(keep, 0.0), [draw.sampling.typical_p for draw in draws])
    mass = probabilities.where(keep, 0.0).cumsum(-1)
    picked = (mass <= _points(draws, logits) * mass[:, -1:]).sum(-1)
    last = (mass < mass[:, -1:]).sum(-1)
    return order.gather(-1, torch.minimum(picked, last)[:, None])[:, 0]


def _kept(probabilities: Tensor, settings: list[Sampling]) -> Tensor:
    """Which of the candidates, in falling order, top_k, top_p (of what top_k left) and min_p keep."""
    count = probabilities.shape[-1]
    rank = torch.arange(count, device=probabilities.device)
    keep = rank < _column([one.top_k or float("inf") for one in settings], probabilities)
    kept = probabilities.where(keep, 0.0)
    # Without a top_k the whole vocabulary is left, whose mass is one.
    left = torch.where(
        _column([one.top_k or 0 for one in settings], probabilities) > 0, kept.sum(-1, keepdim=True), 1.0
    )
    before = (kept.cumsum(-1) - kept) / left  # mass in front of each token: the one that crosses top_p stays
    keep &= before < _column([one.top_p for one in settings], probabilities)
    floor = _column([one.min_p for one in settings], probabilities)
    return keep & (probabilities >= probabilities[:, :1] * floor)


def _typical(kept: Tensor, shares: list[float]) -> Tensor:
    """The tokens whose surprise is nearest the entropy, up to a share of the mass; everything where the share is 1."""
    p = kept / kept.sum(-1, keepdim=True)
    surprise = -p.log()  # infinite where nothing is kept
    entropy = (p * surprise.where(p > 0, 0.0)).sum(-1, keepdim=True)
    nearest = (surprise - entropy).abs().argsort(dim=-1, stable=True)
    ordered = p.gather(-1, nearest)
    share = _column(shares, kept)
    inside = (ordered.cumsum(-1) - ordered < share) | (share >= 1)
    return torch.zeros_like(inside).scatter(-1, nearest, inside)


def _mix(state: int) -> int:
    state = state & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)
