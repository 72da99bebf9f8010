"""Linear layers as torch computes them: every shape, dtype and device, and the numbers that other methods are compared with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lorax_core.linear_methods.base import LinearKernel, LinearMethod


@dataclass(frozen=True, slots=True)
class PlainKernel(LinearKernel):
    """The weight as it is stored."""

    method: ClassVar[str] = "plain"
    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def dense(self) -> Tensor:
        return self.weight

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    def with_bias(self, bias: Tensor | None) -> PlainKernel:
        return replace(self, bias=bias)

    def rows(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


class Plain(LinearMethod):
    """torch's own product."""

    name = "plain"

    def supports(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> str | None:
        return None

    def prepare(self, weight: Tensor, bias: Tensor | None, *, rows: bool = False) -> PlainKernel:
        # The same memory, not a copy: nothing is laid out again.
        return PlainKernel(weight.detach(), bias)
