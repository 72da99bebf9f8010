"""Linear layers: plain, and fused where members read the same input.

Decides how `x W^T + b` is computed on this device. Knows nothing of attention, caches or how an adapter changes the result:
it hands each result to the adapters of its rows.

On CPU the weight is packed once for oneDNN, which here runs two to three times faster than the plain product in float32.
The packed operators are private to torch, so they are tried at first use and the plain product remains when they fail.
"""

from __future__ import annotations

import functools
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorax_core.modeling.batch import HasAdapters
from lorax_core.modeling.site import Site

_PACKABLE = (torch.float32, torch.bfloat16)


class Linear(Site):
    """`x [rows, in] -> [rows, out]`, with the adapters of the rows applied."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight: nn.Parameter | None = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
        self._packed: Tensor | None = None

    def forward(self, x: Tensor, batch: HasAdapters) -> Tensor:
        if self._packed is not None:
            y = _packed_linear(x, self._packed, self.bias)
        else:
            y = F.linear(x, cast("Tensor", self.weight), self.bias)
        return batch.adapters.apply(self, x, y)

    def pack(self) -> None:
        """Lay the weight out for this device's fastest product. Done once, after the weights are in; frees the plain copy."""
        weight = self.weight
        if weight is None or weight.device.type != "cpu" or weight.dtype not in _PACKABLE:
            return
        if not packing_works(weight.dtype):
            return
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        self.weight = None

    @property
    def packed_bytes(self) -> int:
        """Memory of the packed weight, which is no parameter any more."""
        return self._packed.numel() * self._packed.element_size() if self._packed is not None else 0

    def drop_packed(self) -> None:
        """Give the packed weight back; the layer cannot compute until it takes another's."""
        self._packed = None

    def take_packed(self, other: Linear) -> None:
        """Compute with the packed weight of an equal layer from now on; its parameters are taken beside."""
        if other._packed is not None:
            self._packed, self.weight = other._packed, None

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def dense_weight(self) -> Tensor:
        if self._packed is not None:
            return self._packed.to_dense()
        return cast("Tensor", self.weight).detach()


class QKVLinear(Linear):
    """Queries, keys and values of one input in one product; output rows are q, k, v in that order."""

    def __init__(self, hidden: int, heads: int, kv_heads: int, head_dim: int, bias: bool = True) -> None:
        super().__init__(hidden, (heads + 2 * kv_heads) * head_dim, bias)
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim

    @property
    def parts(self) -> tuple[int, ...]:
        kv = self.kv_heads * self.head_dim
        return (self.heads * self.head_dim, kv, kv)

    def project(self, x: Tensor, batch: HasAdapters) -> tuple[Tensor, Tensor, Tensor]:
        """x `[tokens, hidden]` to q `[tokens, heads, dim]`, k and v `[tokens, kv_heads, dim]`."""
        qkv = self(x, batch).view(x.shape[0], -1, self.head_dim)  # [tokens, heads + 2 * kv_heads, dim]
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        return q, k, v


class GateUpLinear(Linear):
    """The two halves of a gated feed-forward layer in one product; output rows are gate, then up."""

    def __init__(self, hidden: int, intermediate: int, bias: bool = False) -> None:
        super().__init__(hidden, 2 * intermediate, bias)
        self.intermediate = intermediate

    @property
    def parts(self) -> tuple[int, ...]:
        return (self.intermediate, self.intermediate)

    def project(self, x: Tensor, batch: HasAdapters) -> tuple[Tensor, Tensor]:
        """x `[tokens, hidden]` to gate and up, each `[tokens, intermediate]`."""
        gate, up = self(x, batch).split(self.intermediate, dim=1)
        return gate, up


def _packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return cast("Tensor", torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], ""))


@functools.cache
def packing_works(dtype: torch.dtype) -> bool:
    """Whether this build of torch packs and multiplies `dtype` as expected, seen on a small product."""
    weight = torch.linspace(-1, 1, 12).view(3, 4).to(dtype)  # [3, 4]
    x = torch.linspace(1, -1, 8).view(2, 4).to(dtype)  # [2, 4]
    bias = torch.ones(3, dtype=dtype)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        y = _packed_linear(x, packed, bias)
        same_weight = torch.equal(packed.to_dense(), weight)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return same_weight and torch.allclose(y.float(), F.linear(x, weight, bias).float(), atol=1e-2)
