"""Normalisations over the last dimension.

Decides their arithmetic: statistics in float32 whatever the dtype of the rows, as transformers does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorax_core.modeling.batch import HasAdapters
from lorax_core.modeling.site import Site


class LayerNorm(Site):
    """`(x - mean) / sqrt(var + eps) * weight + bias`."""

    def __init__(self, size: int, eps: float, bias: bool = True) -> None:
        super().__init__()
        self.in_features = self.out_features = size
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(size), requires_grad=False) if bias else None

    def forward(self, x: Tensor, batch: HasAdapters) -> Tensor:
        return batch.adapters.apply(self, x, self.compute(x, self.weight, self.bias))

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.layer_norm(x, (self.out_features,), weight, bias, self.eps)

    def dense_weight(self) -> Tensor:
        return self.weight.detach()


class RMSNorm(Site):
    """`x / sqrt(mean(x^2) + eps) * weight`."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.in_features = self.out_features = size
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)

    def forward(self, x: Tensor, batch: HasAdapters) -> Tensor:
        return batch.adapters.apply(self, x, self.compute(x, self.weight, None))

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # The rows are normalised in float32 and rounded before the weight: transformers' order, which 16 bit can tell.
        return F.rms_norm(x.float(), (self.out_features,), None, self.eps).to(x.dtype) * weight

    def dense_weight(self) -> Tensor:
        return self.weight.detach()
