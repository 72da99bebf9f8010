"""16-bit numbers cost no more accuracy than they cost the reference.

Decides how an error in 16 bit is judged: against the reference in float32, and beside the reference in the same 16 bit. The
measure is the root of the mean square, for the single worst number is noise.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from lorax_core.testing.case import Case
from lorax_core.testing.check import Check
from lorax_core.testing.reference import Expected
from lorax_core.testing.result import Measured
from lorax_core.types import Task

_FACTOR = 2.0
_FACTOR_OF_FEW = 4.0  # a few logits make no mean: their errors differ by luck
_FEW = 100
_FLOOR = 0.5  # of one rounding: where the reference is exact by luck, we need not be


def _accuracy(case: Case, dtype: torch.dtype) -> Measured:
    found = Measured(0.0, 1.0)
    for task in case.chosen:
        for what, numbers, ours, theirs in _errors(case, task, dtype):
            if math.isnan(ours):  # no comparison with NaN holds, so the next finite error would replace it
                ours = math.inf
            factor = _FACTOR if numbers >= _FEW else _FACTOR_OF_FEW
            tolerance = factor * theirs + _FLOOR * torch.finfo(dtype).eps
            note = f"{what} of {task}: {ours:.2e} of the reference's size; the reference itself loses {theirs:.2e}"
            if not ours / tolerance <= (found.error or 0.0) / (found.tolerance or 1.0):
                found = Measured(ours, tolerance, note)
    return found


def _errors(case: Case, task: Task, dtype: torch.dtype) -> Iterable[tuple[str, int, float, float]]:
    """What is compared, how many numbers that is, our error in 16 bit and the reference's."""
    inputs, exact = case.inputs[:-1], case.expected(task)[:-1]  # 16 bit is slow on a CPU: without the longest
    # A copy: `to` would turn the oracle that other checks use into 16 bit.
    rounded = case.expect(copy.deepcopy(case.reference(task)).to(dtype), inputs)
    ours = case.bench(case.loaded(task, dtype)).whole(inputs)
    yield _judged(
        "hidden rows", [one.hidden for one in ours], [one.hidden for one in rounded], [e.hidden for e in exact]
    )
    if exact[0].logits is not None:
        yield _judged("logits", [answer.parts[task] for answer in ours], _logits(rounded), _logits(exact))


def _judged(
    what: str, ours: Sequence[Tensor], theirs: Sequence[Tensor], exact: Sequence[Tensor]
) -> tuple[str, int, float, float]:
    return what, sum(one.numel() for one in exact), _apart(ours, exact), _apart(theirs, exact)


def _logits(expected: Sequence[Expected]) -> list[Tensor]:
    return [one.logits for one in expected if one.logits is not None]


def _apart(ours: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Root mean square of the differences, as a share of that of the exact numbers."""
    pairs = list(zip(ours, exact, strict=True))
    wrong = sum(float((one.double() - other.double()).square().sum()) for one, other in pairs)
    size = sum(float(other.double().square().sum()) for _, other in pairs)
    return math.sqrt(wrong / size)


CHECKS = tuple(
    Check(f"dtype-{name}", f"{name} loses no more than twice what the reference loses", partial(_accuracy, dtype=dtype))
    for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16))
)
