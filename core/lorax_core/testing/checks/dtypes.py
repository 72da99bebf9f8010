"""16-bit numbers cost no more accuracy than they cost the reference.

Decides how an error in 16 bit is judged: against the reference in float32, and beside the reference in the same 16 bit. The
measure is the root of the mean square, for the single worst number is noise.

Two mistakes are smaller than that noise, and have checks of their own. A constant that is not rounded as the reference rounds
it moves all rows in one direction, where rounding moves them in every direction. A norm in 16 bit makes whole rows too long or
too short. Both are seen on inputs of one token, where attention has nothing to round.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lorax_core.testing import reference
from lorax_core.testing.case import Case
from lorax_core.testing.check import Check
from lorax_core.testing.compare import rms_apart
from lorax_core.testing.inputs import Input
from lorax_core.testing.reference import Expected
from lorax_core.testing.result import BadlyConditioned, Measured, NotApplicable
from lorax_core.types import Task
from lorax_core.weights.loader import LoadedModel

_FACTOR = 2.0
_FACTOR_OF_FEW = 4.0  # a few logits make no mean: their errors differ by luck
_FEW = 100
DTYPES = (torch.bfloat16, torch.float16)
# Of a constant: how sure a difference must be, and the least that counts, of one rounding.
_SIGMAS, _LEAST = 6.0, 0.01
# Of a norm: how much further off the length of rows may be than the reference's, and the least that counts, of one rounding.
_LONGER, _LONGER_FLOOR = 1.5, 0.05
_MOST = 0.1  # of its length, in the reference: beyond, rows of this size are not for its dtype
_MOST_LOST = 0.25  # of the reference's size, by the reference: beyond, nothing is judged
_FLOOR = 0.5  # of one rounding: where the reference is exact by luck, we need not be


def _accuracy(case: Case, dtype: torch.dtype) -> Measured:
    found = Measured(0.0, 1.0)
    for task in case.chosen:
        for what, numbers, ours, theirs in _errors(case, task, dtype):
            # Not where it is NaN, either: float16 overflows in some models.
            if not theirs <= _MOST_LOST:
                raise BadlyConditioned(
                    f"in {_name(dtype)} the reference itself loses {theirs:.1e} of its size ({what})"
                )
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
    return what, sum(one.numel() for one in exact), rms_apart(ours, exact), rms_apart(theirs, exact)


def _logits(expected: Sequence[Expected]) -> list[Tensor]:
    return [one.logits for one in expected if one.logits is not None]


def _constants(case: Case) -> Measured:
    """How much larger or smaller embeddings seem to be than the reference's in the same 16 bit."""
    ids, oracle, step = _ids(case), case.exact(case.main), 0.01
    more, less = (reference.expect_rows(reference.with_larger_tables(oracle, 1 + by), ids) for by in (step, -step))
    slope = (more - less) / (2 * step)  # [ids, hidden]
    found = []
    for dtype in DTYPES:
        rounded = reference.expect_rows(copy.deepcopy(case.reference(case.main)).to(dtype), ids)
        apart = _rows(case, case.loaded(case.main, dtype), ids) - rounded
        # Least squares over all rows; what single rows deviate from it says how sure that is.
        weights, along = slope.square().sum(1), (apart * slope).sum(1)  # [ids]
        size = float(along.sum() / weights.sum())
        unsure = float((along - size * weights).square().sum().sqrt() / weights.sum())
        tolerance = _SIGMAS * unsure + _LEAST * torch.finfo(dtype).eps
        found.append(Measured(abs(size), tolerance, f"in {_name(dtype)} embeddings are {size:+.1e} too large"))
    return _worst(found)


def _norms(case: Case) -> Measured:
    """How much too long rows are, beside those of the reference, where rows and not layers matter."""
    ids, oracle = _ids(case), reference.stressed(case.reference(case.main))
    with tempfile.TemporaryDirectory(dir=case.folder) as name:
        folder = Path(name)
        with reference.quiet():
            oracle.save_pretrained(folder)  # type: ignore[operator]
        exact = reference.expect_rows(oracle, ids)
        found = []
        for dtype in DTYPES:
            theirs = _lengths(reference.expect_rows(copy.deepcopy(oracle).to(dtype), ids), exact)
            # Some models cannot have rows of this size in float16, whose largest number is 65504.
            if not theirs < _MOST:
                continue
            ours = _lengths(_rows(case, case.load(folder, dtype), ids), exact)
            tolerance = _LONGER * theirs + _LONGER_FLOOR * torch.finfo(dtype).eps
            note = f"in {_name(dtype)} rows are {ours:.1e} too long or short; the reference's {theirs:.1e}"
            found.append(Measured(ours, tolerance, note))
    if not found:
        raise NotApplicable("the reference itself does not take rows that are larger than usual")
    return _worst(found)


def _lengths(rows: Tensor, exact: Tensor) -> float:
    """By what share of itself a row is too long, in the root of the mean square over all rows; infinite for NaN."""
    share = ((rows - exact) * exact).sum(1) / exact.square().sum(1)
    return float(share.square().mean().sqrt().nan_to_num(nan=math.inf))


def _ids(case: Case) -> list[int]:
    """Every token but padding, which some architectures give no position."""
    config = case.reference(case.main).config
    return [token for token in range(config.vocab_size) if token != getattr(config, "pad_token_id", None)]


def _rows(case: Case, base: LoadedModel, ids: Sequence[int]) -> Tensor:
    """Our hidden rows `[ids, hidden]` of inputs of one token each."""
    inputs = [Input((token,), (0,)) for token in ids]
    return torch.cat([answer.hidden for answer in case.bench(base, inputs=inputs).whole(inputs)]).double()


def _worst(found: Sequence[Measured]) -> Measured:
    return max(found, key=lambda one: (one.error or 0.0) / (one.tolerance or 1.0))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


CHECKS = (
    *(
        Check(f"dtype-{_name(dtype)}", f"{_name(dtype)} loses no more than twice what the reference loses", run)
        for dtype, run in ((dtype, partial(_accuracy, dtype=dtype)) for dtype in DTYPES)
    ),
    Check(
        "dtype-constants",
        "in 16 bit embeddings are scaled by constants that are rounded as the reference's",
        _constants,
    ),
    Check("dtype-norms", "in 16 bit norms compute in float32 where the reference's do", _norms),
)
