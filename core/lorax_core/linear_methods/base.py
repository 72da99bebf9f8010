"""What a way to compute linear layers is.

Decides the interface: a method prepares a weight once, and the kernel that it gives computes with it from then on. Knows
nothing of modules or checkpoints.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Self

import torch
from torch import Tensor

# Sums of rows in another order stay far below.
_TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


class LinearKernel(ABC):
    """A prepared weight `[out, in]` and a bias `[out]`, ready to compute."""

    method: ClassVar[str]
    bias: Tensor | None

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """`x W^T + bias` for x `[rows, in]`, `[rows, out]`."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The weight `[out, in]` that the kernel computes with, in the dtype of the given one; may be a copy."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Memory of the prepared weight; the bias stays the layer's."""

    @abstractmethod
    def with_bias(self, bias: Tensor | None) -> Self:
        """The same prepared weight with another bias."""

    @property
    def no_rows(self) -> str | None:
        """Why single rows of the weight cannot be read; None when `rows` works, which must be asked for at `prepare`."""
        return None

    @abstractmethod
    def rows(self, ids: Tensor) -> Tensor:
        """Rows `[n, in]` of the weight for ids `[n]`, bit for bit those of `dense()`. Only where `no_rows` is None."""


class LinearMethod(ABC):
    """One way to compute linear layers."""

    name: ClassVar[str]
    copies: ClassVar[bool] = False
    """Whether kernels hold copies, so that the memory of the given weight may be used for other numbers at once."""

    @abstractmethod
    def supports(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> str | None:
        """None when it computes weights `[out, in]` of such a kind, else the reason why not."""

    def tolerance(self, dtype: torch.dtype) -> float | None:
        """How far a product may be from the plain one, as a share of `|x| |w|`.

        None for methods that round weights, which lose as much as the weights ask for: they prove themselves without them.
        """
        return _TOLERANCES.get(dtype, 1e-2)

    @abstractmethod
    def prepare(self, weight: Tensor, bias: Tensor | None, *, rows: bool = False) -> LinearKernel:
        """Lay out a weight `[out, in]` for computing; the caller then drops the given weight.

        With `rows` the kernel also reads single rows, or says in `no_rows` why it cannot.
        """
