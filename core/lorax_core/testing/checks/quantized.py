"""With weights of 8 and 4 bits the model computes what those weights stand for.

Decides how far off that may be. Products round their input to 8 bits, and some random models make much of little: the measure
is how far the same model with plain products moves when each input is off by as much, at random. Knows nothing of how much the
weights themselves lose, which does not depend on the architecture.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from lorax_core.kernels.quantized import FORMATS, Format, rounded
from lorax_core.linear_methods.base import LinearKernel
from lorax_core.linear_methods.plain import PlainKernel
from lorax_core.linear_methods.quantized import QuantizedKernel
from lorax_core.linear_methods.select import LinearPolicy
from lorax_core.modeling.linear import Linear, prepare_linears
from lorax_core.modeling.prepared import PreparedSite
from lorax_core.testing.case import Case
from lorax_core.testing.check import Check
from lorax_core.testing.compare import rms_apart
from lorax_core.testing.packed import PackedAnswer
from lorax_core.testing.result import BadlyConditioned, CheckFailed, Measured, NotApplicable
from lorax_core.types import Task
from lorax_core.weights.loader import LoadedModel

_FACTOR = 3.0
_FACTOR_OF_FEW = 6.0  # a few numbers make no mean: their errors differ by luck
_FEW = 100
_FLOOR = 1e-3
_MOST_MOVED = 0.3  # of the size of all numbers: beyond, a mistake would not show


@dataclass(frozen=True, slots=True)
class _Moved(PlainKernel):
    """A plain product whose input is off by as much as rounding it would lose, at random."""

    format: Format
    generator: torch.Generator

    def __call__(self, x: Tensor) -> Tensor:
        steps = rounded(x, self.format)[1].repeat_interleave(self.format.group, dim=1)[:, : x.shape[1]]  # [rows, in]
        noise = torch.rand(x.shape, generator=self.generator) - 0.5
        return F.linear(x + (noise * steps).to(x.dtype), self.weight, self.bias)


def _computed(case: Case, name: str) -> Measured:
    if case.device != "cpu":
        raise NotApplicable("weights are quantized on a CPU alone")
    worst = Measured(0.0, 1.0)
    generator = torch.Generator().manual_seed(0)

    def exact_kernel(site: PreparedSite) -> LinearKernel:
        return PlainKernel(site.kernel.dense(), site.bias)

    def moved_kernel(site: PreparedSite) -> LinearKernel:
        return _Moved(site.kernel.dense(), site.bias, FORMATS[name], generator)

    for task in case.chosen:
        base = _loaded(case, task, LinearPolicy(quantize=name))
        _refuse_wide_layers(base)
        models = (base, *(_twin(case, task, base, make) for make in (exact_kernel, moved_kernel)))
        answers = [case.bench(one).whole(case.inputs[:-1]) for one in models]  # without the longest input
        for what, read in (("hidden rows", _hidden), (f"answers of {task}", partial(_part, task=task))):
            ours, exact, moved = ([read(one) for one in each] for each in answers)
            error, allowed = rms_apart(ours, exact), rms_apart(moved, exact)
            if not allowed <= _MOST_MOVED:
                raise BadlyConditioned(f"{what} move by {allowed:.1e} of their size when inputs are rounded")
            factor = _FACTOR if sum(one.numel() for one in exact) >= _FEW else _FACTOR_OF_FEW
            tolerance = factor * allowed + _FLOOR
            note = f"{what}: {error:.1e} of their size; with inputs off at random {allowed:.1e}"
            if not error / tolerance <= (worst.error or 0.0) / (worst.tolerance or 1.0):  # NaN is the worst of all
                worst = Measured(error if error == error else math.inf, tolerance, note)
    return worst


def _hidden(answer: PackedAnswer) -> Tensor:
    return answer.hidden


def _part(answer: PackedAnswer, task: Task) -> Tensor:
    return answer.parts[task]


def _loaded(case: Case, task: Task, policy: LinearPolicy | None = None) -> LoadedModel:
    base, _ = case.assemble(case.checkpoint(task), case.dtype)
    prepare_linears(base.model, policy)
    return base


def _twin(case: Case, task: Task, base: LoadedModel, make: Callable[[PreparedSite], LinearKernel]) -> LoadedModel:
    """The same model with other kernels where `base` has quantized ones."""
    twin = _loaded(case, task)
    for path, site in base.model.sites.items():
        other = twin.model.sites[path]
        if (
            isinstance(site, PreparedSite)
            and isinstance(other, PreparedSite)
            and isinstance(site.kernel, QuantizedKernel)
        ):
            other.adopt(make(site))
    return twin


def _refuse_wide_layers(base: LoadedModel) -> None:
    wide = [
        path
        for path, site in base.model.sites.items()
        if isinstance(site, Linear)
        and not isinstance(site.kernel, QuantizedKernel)
        and any(site is module for module in base.model.backbone.modules())
    ]
    if wide:
        raise CheckFailed(f"layers of the backbone keep all their bits: {', '.join(wide)}")


CHECKS = tuple(
    Check(f"quantized-{name}", f"with weights in {name} the model computes what they stand for", run)
    for name, run in ((name, partial(_computed, name=name)) for name in FORMATS)
)
