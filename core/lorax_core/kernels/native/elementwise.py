"""The compiled form of what blocks do to rows beside matrix products, on a CPU.

Decides which rows it takes: float32 and bfloat16 whose numbers lie side by side. Everything else is the readable form's.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorax_core.kernels.elementwise import Activation, Elementwise
from lorax_core.kernels.native.build import load_native
from lorax_core.settings import Settings

SOURCE = Path(__file__).with_name("elementwise.cpp")
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_GATES = ("silu", "gelu_tanh", "relu")
_ADDRESS, _NUMBER, _FLOAT, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
_ROWS = (_ADDRESS, _NUMBER, _ADDRESS, _NUMBER)
_SIGNATURES = {
    "rms_norm": (*_ROWS, _ADDRESS, _ADDRESS, _ADDRESS, _NUMBER, _NUMBER, _FLOAT, _FLOAT, _INT),
    "layer_norm": (*_ROWS, _ADDRESS, _ADDRESS, _ADDRESS, _ADDRESS, _NUMBER, _NUMBER, _FLOAT, _INT),
    **dict.fromkeys(_GATES, (_ADDRESS, _NUMBER, _ADDRESS, _NUMBER, _NUMBER, _INT)),
}


class NativeElementwise(Elementwise):
    """Norms with and without a sum before them, and gates, each in one call."""

    name = "native"

    def __init__(self, library: ctypes.CDLL) -> None:
        self._functions: dict[tuple[str, torch.dtype], Callable[..., None]] = {}
        for name, signature in _SIGNATURES.items():
            for dtype, ending in _DTYPES.items():
                function = getattr(library, f"{name}_{ending}")
                function.argtypes, function.restype = list(signature), None
                self._functions[name, dtype] = function

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
        if not _fits(x, weight):
            return super().rms_norm(x, weight, eps, offset)
        return self._rms(x, None, weight, eps, offset)[0]

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        if not _fits(x, residual, weight):
            return super().add_rms_norm(x, residual, weight, eps, offset)
        return self._rms(x, residual, weight, eps, offset)

    def add_layer_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        if not _fits(x, residual, weight, bias):
            return super().add_layer_norm(x, residual, weight, bias, eps)
        rows, size = x.shape
        out, total = torch.empty((rows, size), dtype=x.dtype), torch.empty((rows, size), dtype=x.dtype)
        self._functions["layer_norm", x.dtype](
            *(x.data_ptr(), x.stride(0), residual.data_ptr(), residual.stride(0), _address(weight), _address(bias)),
            *(out.data_ptr(), total.data_ptr(), rows, size, eps, torch.get_num_threads()),
        )
        return out, total

    def gated_act(self, gate_up: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
        name = act.name if isinstance(act, Activation) else ""
        if name not in _GATES or not _fits(gate_up):
            return super().gated_act(gate_up, act)
        rows, size = gate_up.shape[0], gate_up.shape[1] // 2
        out = torch.empty((rows, size), dtype=gate_up.dtype)
        self._functions[name, gate_up.dtype](
            gate_up.data_ptr(), gate_up.stride(0), out.data_ptr(), rows, size, torch.get_num_threads()
        )
        return out

    def _rms(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float
    ) -> tuple[Tensor, Tensor]:
        rows, size = x.shape
        out = torch.empty((rows, size), dtype=x.dtype)
        total = x if residual is None else torch.empty((rows, size), dtype=x.dtype)
        self._functions["rms_norm", x.dtype](
            *(x.data_ptr(), x.stride(0), _address(residual), residual.stride(0) if residual is not None else 0),
            *(weight.data_ptr(), out.data_ptr(), total.data_ptr(), rows, size, eps, offset, torch.get_num_threads()),
        )
        return out, total


def _fits(x: Tensor, *others: Tensor | None) -> bool:
    """Whether rows `[rows, size]` and what goes with them are of one dtype, with their numbers side by side, on the CPU."""
    if x.dim() != 2 or x.dtype not in _DTYPES or not x.is_cpu or x.stride(1) != 1:
        return False
    return all(each is None or (each.dtype is x.dtype and each.is_cpu and each.stride(-1) == 1) for each in others)


def _address(tensor: Any) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@functools.cache
def load_elementwise(settings: Settings) -> tuple[NativeElementwise | None, str]:
    """The compiled form and where it lies; or None, and why there is none."""
    native = load_native(SOURCE, settings)
    if native.library is None:
        return None, native.reason
    try:
        return NativeElementwise(native.library), native.reason
    except AttributeError as error:
        return None, str(error)
