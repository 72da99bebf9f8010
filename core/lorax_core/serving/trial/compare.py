"""How far numbers of a kernel may be from the readable form's.

Decides by what the readable form itself loses in the same dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_WORST = 0.05
"""No number may be off by more of the largest: one wrong row among thousands hardly shows in a mean."""

_FEWEST = 32
"""So many numbers are judged together at least: a single one may be near zero because larger ones cancelled each other."""


def off(found: Tensor, readable: Tensor, exact: Tensor, rounding: float | None = None) -> str | None:
    """Why `found` is not what it should be, None when it is: `readable` is in the same dtype, `exact` in float32.

    `rounding` counts how often numbers may have been rounded otherwise; None is once in 16 bit, and 128 times in float32, in
    which the readable form is itself the exact one, and sums over thousands of keys lose as much.
    """
    if rounding is None:
        rounding = 128 if found.dtype is torch.float32 else 1
    mine, theirs, right = found.float(), readable.float(), exact.float()
    if not bool(mine.isfinite().all()):
        return "numbers that are not finite, or were not written"
    # By rows: one key too many in one row hardly shows among thousands.
    group = -(-_FEWEST // right[0].numel())  # of narrow rows several
    size = _length(right, group).clamp(min=torch.finfo(torch.float32).tiny)  # [rows]
    lost = _length(mine - right, group) / size
    # Sums in another order lose as much again.
    allowed = 2 * _length(theirs - right, group) / size + rounding * torch.finfo(found.dtype).eps
    row = int((lost - allowed).argmax())
    if lost[row] > allowed[row]:
        return f"off by {float(lost[row]):.1e} in row {row * group}, where {float(allowed[row]):.1e} is allowed"
    worst = float((mine - right).abs().amax() / right.abs().amax())
    if worst > max(_WORST, 2 * float(allowed.max())):
        return f"off by {worst:.1e} of the largest number"
    return None


def _length(rows: Tensor, group: int) -> Tensor:
    """The root mean square of each row, or of each `group` of rows."""
    flat = rows.flatten(1)
    flat = F.pad(flat, (0, 0, 0, -len(flat) % group)).reshape(-1, group * flat.shape[1])
    return flat.square().mean(1).sqrt()
