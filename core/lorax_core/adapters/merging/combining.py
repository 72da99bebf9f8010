"""How several low-rank updates of one module become one.

Decides the arithmetic of each strategy, number for number PEFT's, given the same random masks. Knows nothing of files or of
modules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from lorax_core.adapters.base import known
from lorax_core.errors import AdapterError, listed

SignMethod = Literal["total", "frequency"]
Pair = tuple[Tensor, Tensor]  # a [rank, in], b [out, rank]
Mask = Callable[[Tensor, float], Tensor]
"""Ones where the numbers of a tensor are kept, zeros elsewhere, for the share that is to be kept."""

STRATEGIES: Final = ("linear", "ties", "dare_linear", "dare_ties", "svd", "cat")
SIGN_METHODS: Final = ("total", "frequency")
_SPARSE: Final = ("ties", "dare_linear", "dare_ties")
_DRAWING: Final = ("dare_linear", "dare_ties")


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """How adapters are combined; raises AdapterError for a setting that is none, is missing, or belongs to another strategy.

    `weights` has one number for each adapter. `density` is the share of numbers that are kept, `rank` that of the result.
    """

    strategy: str
    weights: tuple[float, ...]
    density: float | None = None
    seed: int | None = None
    rank: int | None = None
    majority_sign_method: str = "total"

    def __post_init__(self) -> None:
        # An option that a strategy would ignore is an error: it was meant to have an effect.
        known("strategy", self.strategy, STRATEGIES)
        known("majority_sign_method", self.majority_sign_method, SIGN_METHODS)
        if not all(math.isfinite(weight) for weight in self.weights):
            raise AdapterError(
                f"weights are finite numbers; these are {list(self.weights)}",
                hint="give each adapter a number, such as 0.5",
            )
        if self.strategy in _SPARSE and self.density is None:
            raise AdapterError(f"{self.strategy!r} needs a density", hint="the share of numbers to keep, such as 0.5")
        for name, value, takers in (
            ("density", self.density, _SPARSE),
            ("seed", self.seed, _DRAWING),
            ("rank", self.rank, ("svd",)),
        ):
            if value is not None and self.strategy not in takers:
                raise AdapterError(
                    f"{self.strategy!r} takes no {name} (given: {value}); those that take one: {listed(takers)}",
                    hint=f"leave {name} out",
                )
        if self.density is not None and not 0 < self.density <= 1:
            raise AdapterError(
                f"density is above 0 and at most 1; this is {self.density}",
                hint="density=0.5 keeps half of the numbers",
            )
        if self.rank is not None and self.rank < 1:
            raise AdapterError(
                f"rank is at least 1; this is {self.rank}",
                hint="leave rank out, which takes the largest of the adapters",
            )

    @property
    def draws(self) -> bool:
        """Whether random numbers are drawn: not where everything is kept."""
        return self.strategy in _DRAWING and self.density != 1

    @property
    def needs_one_rank(self) -> bool:
        """Whether updates of one module must have equal ranks."""
        return self.strategy not in ("svd", "cat")


@dataclass(frozen=True, slots=True)
class ScaledPair:
    """What one adapter adds to a weight: `strength * b @ a`, with the adapter's own scale and its weight in `strength`."""

    a: Tensor
    b: Tensor
    strength: float


def combined(updates: Sequence[ScaledPair], options: MergeOptions, rank: int, mask: Mask | None = None) -> Pair:
    """One pair for several updates of a module, of scale 1, in float32. `rank` is what `svd` keeps at most; `mask` draws what
    `dare_linear` and `dare_ties` keep.

    Raises AdapterError when the density keeps none of the numbers.
    """
    match options.strategy:
        case "cat":
            return _concatenated(updates)
        case "svd":
            return _decomposed(updates, rank)
        case _:
            return _factorwise(updates, options, mask)


def _concatenated(updates: Sequence[ScaledPair]) -> Pair:
    a = torch.cat([update.a * update.strength for update in updates])  # [sum of ranks, in]
    return a, torch.cat([update.b for update in updates], dim=1)  # [out, sum of ranks]


def _decomposed(updates: Sequence[ScaledPair], rank: int) -> Pair:
    """The best approximation of the sum of all updates by so many ranks.

    The sum `[out, in]` is never formed: its singular values are those of a matrix as small as the ranks together.
    """
    a, b = (tensor.double() for tensor in _concatenated(updates))
    left, left_rest = torch.linalg.qr(b)  # [out, n], [n, ranks]
    right, right_rest = torch.linalg.qr(a.t())  # [in, m], [m, ranks]
    # [n, m], at most the ranks together on each side
    u, values, v = torch.linalg.svd(left_rest @ right_rest.t(), full_matrices=False)
    rank = min(rank, len(values))
    return (v[:rank] @ right.t()).float(), (left @ (u[:, :rank] * values[:rank])).float()


def _factorwise(updates: Sequence[ScaledPair], options: MergeOptions, mask: Mask | None) -> Pair:
    """A and B each combined on their own, as PEFT does: each gets the root of the strength, A its sign as well."""
    # A and B are multiplied with each other, so the roots together give the strength.
    roots = [math.sqrt(abs(update.strength)) for update in updates]
    signed = [math.copysign(root, update.strength) for root, update in zip(roots, updates, strict=True)]
    a = _mixed([update.a for update in updates], signed, options, mask)
    return a, _mixed([update.b for update in updates], roots, options, mask)


def _mixed(tensors: Sequence[Tensor], factors: Sequence[float], options: MergeOptions, mask: Mask | None) -> Tensor:
    if options.density is not None and options.density < 1:
        if options.strategy in _DRAWING:
            assert mask is not None, "dare needs a mask"
            # What is kept is made larger, so that its expectation stays.
            tensors = [tensor * mask(tensor, options.density) / options.density for tensor in tensors]
        else:
            tensors = [_dropped_by_size(tensor, options.density) for tensor in tensors]
    stacked = torch.stack(list(tensors))  # [adapters, rows, columns]
    weighted = stacked * torch.tensor(factors)[:, None, None]
    if not options.strategy.endswith("ties"):
        return weighted.sum(0)
    agreeing = _agreeing(stacked, options.majority_sign_method)
    # A number that no adapter agrees on has a sum of 0; the clamp keeps it from being 0 / 0.
    return (weighted * agreeing).sum(0) / agreeing.sum(0).clamp(min=1.0)


def _dropped_by_size(tensor: Tensor, density: float) -> Tensor:
    """The largest numbers, zero elsewhere."""
    count = int(density * tensor.numel())
    if count == 0:
        raise AdapterError(
            f"density {density} keeps none of the {tensor.numel()} numbers of a tensor {list(tensor.shape)}",
            hint=f"at least 1/{tensor.numel()} keeps one of them",
        )
    kept = torch.zeros(tensor.numel())
    # By count, not by a threshold: of equal numbers no more than `count` are kept.
    kept[tensor.abs().reshape(-1).topk(count).indices] = 1
    return tensor * kept.view_as(tensor)


def seeded_mask(seed: int) -> Mask:
    """Masks of independent coins, one after the other from a generator of this seed. torch's own numbers are not touched."""
    generator = torch.Generator().manual_seed(seed)
    return lambda tensor, density: torch.bernoulli(torch.full_like(tensor, density), generator=generator)


def _agreeing(stacked: Tensor, method: str) -> Tensor:
    """Which numbers have the sign of the majority: of the sum, or of most adapters. Weights do not count, as in PEFT."""
    signs = stacked.sign()
    votes = stacked if method == "total" else signs
    # A tie counts as positive, as in PEFT; a number that is 0 agrees with neither.
    return signs == torch.where(votes.sum(0) >= 0, 1, -1)
