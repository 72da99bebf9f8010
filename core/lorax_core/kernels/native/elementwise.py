"""`NativeElementwise`: norms by the root mean square, gates and activations on a CPU, each in one compiled call.

Decides how tensors become the work of `elementwise.cpp`: the only module that hands their addresses to it. What the source does
not compute, the readable form does. Knows nothing of layers.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from lorax_core.kernels.elementwise import Activation, Elementwise
from lorax_core.kernels.native.build import load_native
from lorax_core.settings import Settings

SOURCE = Path(__file__).with_name("elementwise.cpp")
DTYPES: Final = (torch.float32, torch.bfloat16)
ACTS: Final = {"silu": 0, "gelu_tanh": 1}
"""Activations that the source knows, by the names of `Activation`; the numbers are its own. Torch computes others as fast."""
_ADDRESS, _NUMBER, _FLOAT, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
_NORM = (_ADDRESS, _NUMBER, _ADDRESS, _NUMBER, _ADDRESS, _ADDRESS, _ADDRESS, _NUMBER, _NUMBER, _FLOAT, _FLOAT, _INT)
_ACT = (_INT, _ADDRESS, _NUMBER, _ADDRESS, _ADDRESS, _NUMBER, _NUMBER, _INT)


class NativeElementwise(Elementwise):
    """One call for a norm with its sum, a gate, or an activation, in float32 and bfloat16; torch is as fast for layer norms."""

    name = "native"

    def __init__(self, library: ctypes.CDLL | None = None) -> None:
        """Over the compiled source, which is compiled or found unless given; raises RuntimeError where that cannot be."""
        if library is None:
            native = load_native(SOURCE, Settings.from_env())
            if native.library is None:
                raise RuntimeError(native.reason)
            library = native.library
        self._norms: dict[torch.dtype, Callable[..., None]] = {}
        self._acts: dict[torch.dtype, Callable[..., None]] = {}
        for found, name, types in ((self._norms, "rms_norm", _NORM), (self._acts, "act", _ACT)):
            for dtype in DTYPES:
                function = getattr(library, f"{name}_{str(dtype).removeprefix('torch.')}")
                function.argtypes, function.restype = types, None
                found[dtype] = function

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
        if not (_rows(x) and _weighs(weight, x)):
            return super().rms_norm(x, weight, eps, offset)
        out = torch.empty(x.shape, dtype=x.dtype)
        self._norms[x.dtype](
            *(x.data_ptr(), x.stride(0), None, 0, weight.data_ptr(), out.data_ptr(), None),
            *(*x.shape, eps, offset, torch.get_num_threads()),
        )
        return out

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        same = residual.dtype is x.dtype and residual.shape == x.shape
        if not (_rows(x) and _weighs(weight, x) and same and residual.stride(1) == 1):
            return super().add_rms_norm(x, residual, weight, eps, offset)
        out, sums = torch.empty(x.shape, dtype=x.dtype), torch.empty(x.shape, dtype=x.dtype)
        self._norms[x.dtype](
            *(x.data_ptr(), x.stride(0), residual.data_ptr(), residual.stride(0)),
            *(weight.data_ptr(), out.data_ptr(), sums.data_ptr(), *x.shape, eps, offset, torch.get_num_threads()),
        )
        return out, sums

    def gated_act(self, gate_up: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
        kind = _kind(act)
        if kind is None or not _rows(gate_up) or gate_up.shape[1] % 2:
            return super().gated_act(gate_up, act)
        size = gate_up.shape[1] // 2
        return self._act(kind, gate_up, size, gate_up.data_ptr() + size * gate_up.element_size())

    def act(self, x: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
        kind = _kind(act)
        if kind is None or not _rows(x):
            return super().act(x, act)
        return self._act(kind, x, x.shape[1], None)

    def _act(self, kind: int, x: Tensor, size: int, gated: int | None) -> Tensor:
        """The activation of the first `size` columns of x, times the rows at the address `gated` where there is one."""
        out = torch.empty((x.shape[0], size), dtype=x.dtype)
        self._acts[x.dtype](
            *(kind, x.data_ptr(), x.stride(0), gated, out.data_ptr(), x.shape[0], size, torch.get_num_threads())
        )
        return out


def _kind(act: Callable[[Tensor], Tensor]) -> int | None:
    return ACTS.get(act.name) if isinstance(act, Activation) else None


def _rows(x: Tensor) -> bool:
    """Whether the source can read x: neighbours side by side, on a CPU."""
    return x.ndim == 2 and x.dtype in DTYPES and x.stride(1) == 1 and x.device.type == "cpu"


def _weighs(weight: Tensor, x: Tensor) -> bool:
    return weight.dtype is x.dtype and weight.shape[0] == x.shape[1] and weight.is_contiguous()


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
