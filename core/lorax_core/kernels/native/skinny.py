"""The compiled product for few rows, over weights that oneDNN has packed.

Decides how tensors become the arguments of `skinny.cpp`: the only module that hands their addresses to it. Knows nothing of
layers; for how many rows it is used is for the caller to decide.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lorax_core.kernels.native.build import load_native
from lorax_core.settings import Settings

SOURCE = Path(__file__).with_name("skinny.cpp")
MOST_ROWS = 64
"""More the source has no memory for."""
WIDTHS = (64, 48, 32, 16)
"""Output rows of a block that it reads."""
_TYPES = {torch.float32: ("skinny_float32", 1), torch.bfloat16: ("skinny_bfloat16", 2)}


class SkinnyProduct:
    """`x W^T + bias` for few rows x in float32 or bfloat16 on the CPU."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._functions: dict[torch.dtype, Callable[..., None]] = {}
        for dtype, (name, _) in _TYPES.items():
            function = getattr(library, name)
            address, number = ctypes.c_void_p, ctypes.c_int64
            function.argtypes = [
                *(address, number, address, number, address, address, number),
                *(number, number, number, ctypes.c_int),
            ]
            function.restype = None
            self._functions[dtype] = function

    def reads(self, blocks: Tensor) -> bool:
        """Whether it knows the layout of `blocks` `[blocks, in / vector, rows of a block, vector]`."""
        known = _TYPES.get(blocks.dtype)
        return (
            known is not None and blocks.shape[3] == known[1] and blocks.shape[2] in WIDTHS and blocks.is_contiguous()
        )

    def __call__(self, x: Tensor, blocks: Tensor, bias: Tensor | None, out: int) -> Tensor:
        """The product `[rows, out]` of x `[rows, in]`, at most `MOST_ROWS`, with a weight of `out` rows."""
        if x.stride(1) != 1:
            x = x.contiguous()
        rows, width = x.shape
        y = torch.empty((rows, out), dtype=x.dtype)
        self._functions[x.dtype](
            *(x.data_ptr(), x.stride(0), blocks.data_ptr(), blocks.shape[2]),
            *(bias.data_ptr() if bias is not None else None, y.data_ptr(), out, rows, width, out),
            torch.get_num_threads(),
        )
        return y


@functools.cache
def load_skinny(settings: Settings) -> tuple[SkinnyProduct | None, str]:
    """The compiled product and where it lies; or None, and why there is none."""
    native = load_native(SOURCE, settings)
    if native.library is None:
        return None, native.reason
    try:
        return SkinnyProduct(native.library), native.reason
    except AttributeError as error:
        return None, str(error)
