"""Normalisations over the last dimension.

Decides which arithmetic a layer has and that adapters may replace its numbers. An `Elementwise` computes it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor, nn

from lorax_core.kernels.elementwise import HasElementwise
from lorax_core.modeling.site import HasAdapters, Site
from lorax_core.untrusted import is_number


class Norm(Site, HasElementwise):
    """A normalisation with a weight `[size]` and a bias, or without either; a subclass gives `compute`.

    Raises ValueError for an `eps` that is no number, or below 0.
    """

    def __init__(self, size: int, eps: float, bias: bool, weight: bool = True) -> None:
        super().__init__()
        # 0 is as transformers computes it: a row of equal numbers has no other answer than NaN.
        if not (is_number(eps) and eps >= 0):
            raise ValueError(f"a norm with an eps of {eps!r}; it is a number, and at least 0")
        self.in_features = self.out_features = size
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False) if weight else None
        self.bias = nn.Parameter(torch.empty(size), requires_grad=False) if bias else None

    @final
    def add(self, x: Tensor, residual: Tensor, batch: HasAdapters) -> tuple[Tensor, Tensor]:
        """The normalised sum of x and residual, and the sum, which is the next residual; all `[rows, size]`."""
        normed, total = self._added(x, residual)
        # Kernels know no adapters; these are applied here, with the sum as the norm's input.
        return batch.adapters.apply(self, total, normed), total

    def compute(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """x `[rows, size]` (`[rows, heads, size]` of heads) normalised with these numbers; the one method to override."""
        raise NotImplementedError

    @final
    def computed_with(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return self.compute(x, weight, bias)

    def dense_weight(self) -> Tensor:
        assert self.weight is not None, "a norm without a weight has none to change"
        return self.weight.detach()

    def _base(self, x: Tensor) -> Tensor:
        return self.compute(x, self.weight, self.bias)

    def _added(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual  # [rows, size]
        return self._base(total), total

    def _computes_as(self, compute: Callable[..., Tensor]) -> bool:
        """Whether nobody overrode that `compute`, in a subclass or on this layer: only then is a fused form the same."""
        return getattr(self.compute, "__func__", None) is compute


class LayerNorm(Norm):
    """`(x - mean) / sqrt(var + eps) * weight + bias`; without `weight`, neither (OLMo)."""

    def __init__(self, size: int, eps: float, bias: bool = True, weight: bool = True) -> None:
        super().__init__(size, eps, bias and weight, weight)

    def compute(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return self.elementwise.layer_norm(x, weight, bias, self.eps)

    def _added(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        if not self._computes_as(LayerNorm.compute):
            return super()._added(x, residual)
        return self.elementwise.add_layer_norm(x, residual, self.weight, self.bias, self.eps)


class RMSNorm(Norm):
    """`x / sqrt(mean(x^2) + eps) * (offset + weight)`; Gemma has an offset of 1."""

    def __init__(self, size: int, eps: float, offset: float = 0.0) -> None:
        super().__init__(size, eps, bias=False)
        self.offset = offset

    def compute(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        assert weight is not None
        # Rows of heads are made plain ones, which kernels know.
        flat = x.flatten(0, -2) if x.ndim > 2 else x
        return self.elementwise.rms_norm(flat, weight, self.eps, self.offset).view(x.shape)

    def _added(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        if not self._computes_as(RMSNorm.compute):
            return super()._added(x, residual)
        assert self.weight is not None
        return self.elementwise.add_rms_norm(x, residual, self.weight, self.eps, self.offset)
