"""How far apart two tensors are, and how far they may be.

Decides the measure and the tolerances of the kit. Knows nothing of where tensors come from.

The measure is the largest absolute difference, as a share of the reference's largest absolute number. float32 carries
about 1.2e-7 of a number; a few dozen operations in another order move results by some 1e-6, a mistake in the model moves
them by 1e-2 and more. 2e-5 lies between, far from both.

Some models magnify rounding: attention that is all but a choice, layers that each add a hundredfold. What the reference loses
in float32 against itself in float64 says how much, and a right model may lose as much again. Where that comes near to what a
mistake would do, no mistake can be seen, and the verdict is "badly conditioned".

In 16 bit and with rounded weights single numbers are noise: there `rms_apart` is the measure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lorax_core.testing.result import BadlyConditioned, CheckFailed, Measured

TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-2, torch.bfloat16: 2.5e-1}
"""By the dtype that a model computes in. The 16-bit ones are for backends without float32."""


# Ours and the reference's rounding are independent, and the largest of so many differences varies from order to order.
_FACTOR = 4
_LARGEST = 1e-3
"""The largest tolerance in float32: a tenth of what the smallest mistakes do."""


def tolerance(dtype: torch.dtype, loss: float) -> float:
    """How far numbers in `dtype` may be from a reference that itself loses `loss` in float32.

    Raises BadlyConditioned where that is so much that no tolerance tells rounding from mistakes.
    """
    if not _FACTOR * loss <= _LARGEST:
        raise BadlyConditioned(
            f"in float32 the reference itself loses {loss:.1e} of its largest number against float64, where "
            f"{_LARGEST / _FACTOR:.1e} is the most that can be judged",
        )
    # What magnifies rounding in float32 magnifies that of 16 bit as much. Half of it: a right model lost less than that in all
    # variants measured, and more would hide mistakes.
    magnified = loss * torch.finfo(dtype).eps / torch.finfo(torch.float32).eps / 2
    return max(TOLERANCES[dtype], _FACTOR * loss, magnified)


class Worst:
    """The largest of many differences, and where it was.

    Numbers of one `kind` (hidden rows, logits of a head) share a unit, the largest of them in the reference: three logits that
    happen to be small all the same came from sums of large numbers.
    """

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance
        self._apart: dict[str, tuple[float, str]] = {}  # kind -> largest absolute difference and its place
        self._units: dict[str, float] = {}

    def see(self, kind: str, where: str, ours: Tensor, theirs: Tensor) -> None:
        """Compare a pair of tensors of a kind, found at `where`; raises CheckFailed when their shapes differ."""
        if ours.shape != theirs.shape:
            raise CheckFailed(f"{kind} {where}: shape {list(ours.shape)} where {list(theirs.shape)} belongs")
        ours, theirs = ours.double().cpu(), theirs.double().cpu()
        # max() of a difference with NaN is NaN, which is larger than nothing and would be lost below.
        apart = float((ours - theirs).abs().max()) if torch.isfinite(ours).all() else math.inf
        if kind not in self._apart or apart > self._apart[kind][0]:
            self._apart[kind] = apart, f"{kind} {where}"
        # 1e-30: a reference of zeros must not divide by zero, and any difference from it is then huge.
        self._units[kind] = max(self._units.get(kind, 1e-30), float(theirs.abs().max()))

    def measured(self, note: str = "") -> Measured:
        """The outcome; `note` adds to the place of the largest difference."""
        if not self._apart:
            raise CheckFailed("nothing was compared")
        found = [(apart / self._units[kind], place) for kind, (apart, place) in self._apart.items()]
        error, place = max(found)
        where = f"largest: {place}" if error else "no difference"
        if not math.isfinite(error):
            where = f"not finite: {place}"
        return Measured(error, self.tolerance, "; ".join(filter(None, (where, note))))


def rms_apart(ours: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Root mean square of the differences, as a share of that of the exact numbers."""
    pairs = list(zip(ours, exact, strict=True))
    wrong = sum(float((one.double() - other.double()).square().sum()) for one, other in pairs)
    size = sum(float(other.double().square().sum()) for _, other in pairs)
    return math.sqrt(wrong / size)
