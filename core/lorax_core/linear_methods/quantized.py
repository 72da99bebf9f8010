"""Linear layers with weights of 8 or 4 bits, rounded when the model is loaded.

Decides that rows of x are rounded to 8 bits as well, so that products are sums of whole numbers, and which form computes them.
Knows nothing of which layers keep more bits: `modeling.linear` decides that.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from lorax_core.kernels.native.quantized import DTYPES, QuantizedProduct, load_quantized
from lorax_core.kernels.quantized import FORMATS, Format, Quantized, multiply, quantize
from lorax_core.linear_methods.base import LinearKernel, LinearMethod
from lorax_core.settings import Settings

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class QuantizedKernel(LinearKernel):
    """A weight in 8 or 4 bits; `product` is the compiled form, None for that in plain torch."""

    weight: Quantized
    bias: Tensor | None
    product: QuantizedProduct | None

    def __call__(self, x: Tensor) -> Tensor:
        product = self.product or multiply
        if x.dtype in DTYPES:
            return product(x, self.weight, self.bias)
        bias = self.bias.float() if self.bias is not None else None
        return product(x.float(), self.weight, bias).to(x.dtype)

    def dense(self) -> Tensor:
        return self.weight.dense()

    @property
    def nbytes(self) -> int:
        return self.weight.data.nbytes

    def with_bias(self, bias: Tensor | None) -> Self:
        return replace(self, bias=bias)

    def rows(self, ids: Tensor) -> Tensor:
        return self.weight.rows(ids)


class Int8Kernel(QuantizedKernel):
    """8 bits."""

    method: ClassVar[str] = "int8"


class Int4Kernel(QuantizedKernel):
    """4 bits."""

    method: ClassVar[str] = "int4"


class Quantization(LinearMethod):
    """Weights in one of `kernels.quantized.FORMATS`."""

    copies = True
    format: ClassVar[Format]
    kernel: ClassVar[type[QuantizedKernel]]

    def supports(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> str | None:
        return None if device.type == "cpu" else f"{self.name} computes on a CPU, not on {device.type}"

    def tolerance(self, dtype: torch.dtype) -> None:
        return None  # the compiled form was compared with plain torch when it was loaded

    def prepare(self, weight: Tensor, bias: Tensor | None, *, rows: bool = False) -> QuantizedKernel:
        product = _compiled()
        pack = product.quantize if product is not None else quantize
        return self.kernel(pack(weight.detach(), self.format), bias, product)


class Int8(Quantization):
    """8 bits for each number."""

    name = "int8"
    format, kernel = FORMATS["int8"], Int8Kernel


class Int4(Quantization):
    """4 bits for each number."""

    name = "int4"
    format, kernel = FORMATS["int4"], Int4Kernel


@functools.cache
def _compiled() -> QuantizedProduct | None:
    product, reason = load_quantized(Settings.from_env())
    if product is None:
        _log.warning("weights of 8 and 4 bits are computed in plain torch, which is slow: %s", reason)
    return product
