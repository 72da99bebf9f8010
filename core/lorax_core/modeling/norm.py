"""Normalisations over the last dimension.

Decides which arithmetic a layer has and that adapters may replace its numbers. `kernels.elementwise` computes it.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from lorax_core.kernels import elementwise
from lorax_core.modeling.site import HasAdapters, Site
from lorax_core.untrusted import is_number


class Norm(Site):
    """A normalisation with a weight `[size]` and perhaps a bias; a subclass gives `compute`.

    Raises ValueError for an `eps` that is no number, or below 0.
    """

    def __init__(self, size: int, eps: float, bias: bool) -> None:
        super().__init__()
        # 0 is as transformers computes it: a row of equal numbers has no other answer than NaN.
        if not (is_number(eps) and eps >= 0):
            raise ValueError(f"a norm with an eps of {eps!r}; it is a number, and at least 0")
        self.in_features = self.out_features = size
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(size), requires_grad=False) if bias else None

    @final
    def add(self, x: Tensor, residual: Tensor, batch: HasAdapters) -> tuple[Tensor, Tensor]:
        """The normalised sum of x and residual, and the sum, which is the next residual; all `[rows, size]`."""
        # The kernel seam knows no adapters, so it gets `_base`; they are applied below, with the sum as the norm's input.
        normed, total = elementwise.add_norm(x, residual, self._base)
        return batch.adapters.apply(self, total, normed), total

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x `[rows, size]` normalised with these numbers; the one method to override."""
        raise NotImplementedError

    @final
    def computed_with(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.compute(x, weight, bias)

    def dense_weight(self) -> Tensor:
        return self.weight.detach()

    def _base(self, x: Tensor) -> Tensor:
        return self.compute(x, self.weight, self.bias)


class LayerNorm(Norm):
    """`(x - mean) / sqrt(var + eps) * weight + bias`."""

    def __init__(self, size: int, eps: float, bias: bool = True) -> None:
        super().__init__(size, eps, bias)

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return elementwise.layer_norm(x, weight, bias, self.eps)


class RMSNorm(Norm):
    """`x / sqrt(mean(x^2) + eps) * (offset + weight)`; Gemma has an offset of 1."""

    def __init__(self, size: int, eps: float, offset: float = 0.0) -> None:
        super().__init__(size, eps, bias=False)
        self.offset = offset

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return elementwise.rms_norm(x, weight, self.eps, self.offset)
