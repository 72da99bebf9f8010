"""The compiled product over weights of 8 and 4 bits.

Decides how tensors become the arguments of `quantized.cpp`: the only module that hands their addresses to it. Knows nothing of
layers; `kernels.quantized` says what the numbers mean.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lorax_core.kernels.native.build import load_native
from lorax_core.kernels.quantized import FORMATS, Format, Quantized, multiply, quantize
from lorax_core.settings import Settings

SOURCE = Path(__file__).with_name("quantized.cpp")
DTYPES = (torch.float32, torch.bfloat16)
"""Of x, the bias and the given weight."""


class QuantizedProduct:
    """`quantize` and `multiply` of `kernels.quantized`, compiled."""

    def __init__(self, library: ctypes.CDLL) -> None:
        address, number = ctypes.c_void_p, ctypes.c_int64
        own_bytes = library.quantized_own_bytes
        own_bytes.restype = number
        self._own_bytes: int = own_bytes()
        self._functions: dict[tuple[int, torch.dtype], tuple[Callable[..., None], Callable[..., None]]] = {}
        for form in FORMATS.values():
            for dtype in DTYPES:
                name = f"int{form.bits}_{str(dtype).removeprefix('torch.')}"
                pack, product = getattr(library, f"pack_{name}"), getattr(library, f"multiply_{name}")
                pack.argtypes = [address, number, number, address, ctypes.c_int]
                product.argtypes = [
                    *(address, number, address, address, address, address, number, number, number),
                    ctypes.c_int,
                ]
                pack.restype = product.restype = None
                self._functions[form.bits, dtype] = pack, product

    def quantize(self, weight: Tensor, form: Format) -> Quantized:
        """A weight `[out, width]` in this format; of another dtype than `DTYPES` it is converted first."""
        given = weight.contiguous() if weight.dtype in DTYPES else weight.float().contiguous()
        out, width = weight.shape
        data = form.empty(out, width)
        pack, _ = self._functions[form.bits, given.dtype]
        pack(given.data_ptr(), out, width, data.data_ptr(), torch.get_num_threads())
        return Quantized(form, data, out, width, weight.dtype)

    def __call__(self, x: Tensor, weight: Quantized, bias: Tensor | None) -> Tensor:
        """`x W^T + bias` `[rows, out]` for x `[rows, width]` in one of `DTYPES`."""
        if x.stride(1) != 1:
            x = x.contiguous()
        rows, groups, form = x.shape[0], weight.data.shape[1], weight.format
        y = x.new_empty(rows, weight.out)
        # Of each row: a scale and a sum of each group, and the codes. For few rows that is at hand: no memory is asked for.
        needed = rows * groups * (8 + form.group)
        scratch = torch.empty(needed, dtype=torch.uint8) if needed > self._own_bytes else None
        _, product = self._functions[form.bits, x.dtype]
        product(
            *(x.data_ptr(), x.stride(0), weight.data.data_ptr(), bias.data_ptr() if bias is not None else None),
            *(y.data_ptr(), scratch.data_ptr() if scratch is not None else None, rows, weight.width, weight.out),
            torch.get_num_threads(),
        )
        return y


@functools.cache
def load_quantized(settings: Settings) -> tuple[QuantizedProduct | None, str]:
    """The compiled product and where it lies; or None, and why there is none."""
    native = load_native(SOURCE, settings)
    if native.library is None:
        return None, native.reason
    try:
        product = QuantizedProduct(native.library)
    except AttributeError as error:
        return None, str(error)
    problem = _difference(product)
    return (product, native.reason) if problem is None else (None, problem)


def _difference(product: QuantizedProduct) -> str | None:
    """How it differs from plain torch on a small weight with rests on all sides; None when it does not."""
    out, width = 70, 201
    weight = torch.linspace(-3, 3, out * width).view(out, width).sin()
    x = torch.linspace(-1, 1, 7 * width).view(7, width).cos()
    bias = torch.linspace(-1, 1, out)
    for name, form in FORMATS.items():
        # Of two scales that are as good either may be taken.
        lost, least = ((by(weight, form).dense() - weight).norm() for by in (product.quantize, quantize))
        if lost > 1.01 * least:
            return f"loses more than torch in {name}"
        for dtype in DTYPES:
            packed = quantize(weight.to(dtype), form)
            found, expected = (by(x.to(dtype), packed, bias.to(dtype)).float() for by in (product, multiply))
            tolerance = 1e-5 if dtype is torch.float32 else 1e-2
            if (found - expected).abs().max() > tolerance * expected.abs().max():
                return f"gives other numbers in {name} and {str(dtype).removeprefix('torch.')} than torch"
    return None
